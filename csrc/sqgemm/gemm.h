// Textual part of sqgemm_cpu.cpp, AVX-512 only: a decoded tile times many tokens.

inline constexpr int kTogether = 6;  // tokens of a register tile: 24 sums, 4 of codes, 1 broadcast

struct Grid {
  alignas(64) float scales[4 * kTileRows], zeros[4 * kTileRows];
};

// C [T][64] += panel times tokens; x, sums, scales: of the first token.
template <int T>
void multiply(const uint8_t* panel, const Grid& grid, int groups, bool symmetric, const int8_t* x,
              const int32_t* sums, const float* scales, float* C) {
  const int steps = 32 / groups;
  for (int q = 0; q < groups; ++q) {
    vi acc[4][T];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const vi zero = __builtin_convertvector(load(grid.zeros + q * kTileRows + 16 * v), vi);
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) acc[v][t] = zero * -sums[t * groups + q];
    }
    for (int k = 0; k < steps; ++k, panel += 256, x += 4) {
      vi w[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) w[v] = load_codes(panel + 64 * v);
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) {
        const vi a = four_bytes(x + t * kTileCols);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) dot(acc[v][t], w[v], a);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const vf w = load(grid.scales + q * kTileRows + 16 * v);
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) {
        float* y = C + t * kTileRows + 16 * v;
        const vf sum = __builtin_convertvector(acc[v][t], vf);
        store(y, fma(w, sum * splat(scales[t * groups + q]), load(y)));
      }
    }
  }
  (void)symmetric;
}

template <Kind kind>
void gemm(const Format& f, const uint8_t* buffer, int64_t row_tile, const Quantized& x, int64_t t0,
          int64_t t1, float* C) {
  alignas(64) uint8_t panel[pack::kTileWeights];
  Grid grid;
  const int groups = std::max(1, f.tile_groups());
  std::memset(C, 0, sizeof(float) * static_cast<size_t>((t1 - t0) * kTileRows));
  const int64_t blocks = (t1 - t0 + kTogether - 1) / kTogether;
  for (int64_t c = 0; c < x.col_tiles; ++c) {
    const Ahead next = ahead(f, buffer, row_tile * x.col_tiles + c);
    for (int u = 0; u < 4; ++u) prefetch_quarter(next, u);
    decode<kind, false>(f, buffer, row_tile, c, panel);
    tile_grid(f, buffer, row_tile, c, grid.scales, grid.zeros);
    for (int64_t b = 0; b < blocks; ++b) {  // sizes differ by at most one
      const int64_t t = t0 + b * (t1 - t0) / blocks, n = t0 + (b + 1) * (t1 - t0) / blocks - t;
      const int64_t at = c * x.tokens + t;
      const auto run = [&]<int T>() {
        multiply<T>(panel, grid, groups, f.symmetric, x.values.get() + at * kTileCols,
                    x.sums.get() + at * groups, x.scales.get() + at * groups,
                    C + (t - t0) * kTileRows);
      };
      switch (n) {
        case 1: run.template operator()<1>(); break;
        case 2: run.template operator()<2>(); break;
        case 3: run.template operator()<3>(); break;
        case 4: run.template operator()<4>(); break;
        case 5: run.template operator()<5>(); break;
        default: run.template operator()<6>();
      }
    }
  }
}
