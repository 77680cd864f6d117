// Textual part of sqgemm_cpu.cpp: 64 rows of y = x W^T with int8 activations.

#if DISTAYA_LANES == 16

template <Kind kind>
void int8_rows_of(const Format& f, const uint8_t* buffer, int64_t row_tile, const Quantized& x,
                  int64_t t0, int64_t t1, float* C) {
  switch (t1 - t0) {
    case 0: return;
    case 1: return gemv<kind, 1>(f, buffer, row_tile, x, t0, C);
    case 2: return gemv<kind, 2>(f, buffer, row_tile, x, t0, C);
    case 3: return gemv<kind, 3>(f, buffer, row_tile, x, t0, C);
    case 4: return gemv<kind, 4>(f, buffer, row_tile, x, t0, C);
    default: return gemm<kind>(f, buffer, row_tile, x, t0, t1, C);
  }
}

// C [t1 - t0][64] = X W^T for tokens [t0, t1) and the 64 rows of a row tile, over all columns.
inline void int8_rows(const Format& f, const uint8_t* buffer, int64_t row_tile, const Quantized& x,
                      int64_t t0, int64_t t1, float* C) {
  switch (f.kind) {
    case Kind::int4: return int8_rows_of<Kind::int4>(f, buffer, row_tile, x, t0, t1, C);
    case Kind::int3: return int8_rows_of<Kind::int3>(f, buffer, row_tile, x, t0, t1, C);
    case Kind::int8: return int8_rows_of<Kind::int8>(f, buffer, row_tile, x, t0, t1, C);
    case Kind::int4_24: return int8_rows_of<Kind::int4_24>(f, buffer, row_tile, x, t0, t1, C);
    case Kind::int4_mask: return int8_rows_of<Kind::int4_mask>(f, buffer, row_tile, x, t0, t1, C);
    default: return int8_rows_of<Kind::int4_out>(f, buffer, row_tile, x, t0, t1, C);
  }
}

#else

// C [t1 - t0][64] = X W^T for tokens [t0, t1) and the 64 rows of a row tile, over all columns.
inline void int8_rows(const Format& f, const uint8_t* buffer, int64_t row_tile, const Quantized& x,
                      int64_t t0, int64_t t1, float* C) {
  alignas(64) uint8_t panel[pack::kTileWeights];
  alignas(64) float scales[4 * kTileRows], zeros[4 * kTileRows];
  std::memset(C, 0, sizeof(float) * static_cast<size_t>((t1 - t0) * kTileRows));
  for (int64_t c = 0; c < x.col_tiles; ++c) {
    decode_panel(f, buffer, row_tile, c, panel);
    tile_grid(f, buffer, row_tile, c, scales, zeros);
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t at = c * x.tokens + t;
      alignas(16) int8_t codes[kTileCols];
      std::memcpy(codes, x.values.get() + at * kTileCols, sizeof codes);
      if (f.kind == Kind::int4)  // the panel is in natural order
        for (int i = 0; i < 2; ++i) interleave8(codes);
      const int width = static_cast<int>(kTileCols / x.blocks);
      for (int r = 0; r < kTileRows; ++r)
        for (int b = 0; b < x.blocks; ++b) {
          int32_t sum = -static_cast<int32_t>(zeros[b * kTileRows + r]) * x.sums[at * x.blocks + b];
          for (int k = b * width; k < (b + 1) * width; ++k) sum += panel[panel_at(r, k)] * codes[k];
          float& y = C[(t - t0) * kTileRows + r];
          y = std::fma(scales[b * kTileRows + r],
                       static_cast<float>(sum) * x.scales[at * x.blocks + b], y);
        }
    }
  }
}

#endif
