// Textual part of sqgemm_cpu.cpp, AVX-512 only: 64 rows times a few tokens. Codes go from the
// buffer straight into the multiplication; weights are read once, in the order of memory.

template <Kind kind>
constexpr int kBodyBytes = Format{.kind = kind}.body_bytes();

// Scales of 16 rows.
DISTAYA_INLINE vf scales16(Dtype dtype, const uint8_t* scales, int row) {
  if (dtype == Dtype::bf16) return load(reinterpret_cast<const bf16*>(scales) + row);
  if (dtype == Dtype::f16) return load(reinterpret_cast<const f16*>(scales) + row);
  return load(reinterpret_cast<const float*>(scales) + row);
}

DISTAYA_INLINE const uint8_t* scales_of(const Format& f, const uint8_t* buffer, int64_t row_tile,
                                        const uint8_t* record, int q) {
  const int64_t line = static_cast<int64_t>(kTileRows) * f.scale_bytes();
  return f.group ? record + q * line : buffer + pack::row_section_at(f, buffer) + row_tile * line;
}

// Asks for step j of a unit of the record ahead. The two forms ask for the same lines of int4; the
// first is 7 % faster there (Zen 5), the second 25 % for int3.
template <Kind kind>
DISTAYA_INLINE void ask(Ahead& next, int j) {
  if constexpr (kind == Kind::int4 || kind == Kind::int4_mask || kind == Kind::int4_out) {
    __builtin_prefetch(next.at);
    __builtin_prefetch(next.at + 64);
    next.at += next.bytes;
  } else {
    constexpr int kLines = kBodyBytes<kind> / 4 / 64;  // of a unit
#pragma GCC unroll 4
    for (int i = j * kLines / 8; i < (j + 1) * kLines / 8; ++i)
      __builtin_prefetch(next.at + 64 * i);
    if (j == 7) next.at += 64 * kLines;
  }
}

// C [T][64] of tokens t0 .. t0 + T - 1.
template <Kind kind, int T>
void gemv(const Format& f, const uint8_t* buffer, int64_t row_tile, const Quantized& x, int64_t t0,
          float* C) {
  const int groups = std::max(1, f.tile_groups()), units = 4 / groups;
  vf y[T][4] = {};
  Codes codes;
  vi zero[4];
  codes.zero = zero;
  for (int64_t c = 0; c < x.col_tiles; ++c) {
    const uint8_t* record = buffer + pack::record_at(f, buffer, row_tile, c);
    Ahead next = ahead(f, buffer, row_tile * x.col_tiles + c);
    next.bytes /= 32;
    const int64_t at = c * x.tokens + t0;
    const int8_t* values = x.values.get() + at * kTileCols;
    begin<kind>(codes, record + f.body_at());
    for (int q = 0, u = 0; q < groups; ++q) {
      const uint8_t* zeros = zeros_of(f, buffer, row_tile, c, q);
      spread_zeros(zeros, f.symmetric_zero(), zero);
      vi acc[4][T];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v)
#pragma GCC unroll 6
        for (int t = 0; t < T; ++t) acc[v][t] = (zero[v] & 255) * -x.sums[(at + t) * groups + q];
      for (const int end = u + units; u < end; ++u) {
        const int8_t* columns = values + 32 * u;
        visit<kind, false>(codes, f, u, [&](int j, const vi* w) __attribute__((always_inline)) {
          ask<kind>(next, j);
#pragma GCC unroll 6
          for (int t = 0; t < T; ++t) {
            const vi a = four_bytes(columns + t * kTileCols + 4 * j);
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) dot(acc[v][t], w[v], a);
          }
        });
      }
      const uint8_t* scales = scales_of(f, buffer, row_tile, record, q);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const vf w = scales16(f.scale, scales, 16 * v);
#pragma GCC unroll 6
        for (int t = 0; t < T; ++t) {
          const vf sum = __builtin_convertvector(acc[v][t], vf);
          y[t][v] = fma(w, sum * splat(x.scales[(at + t) * groups + q]), y[t][v]);
        }
      }
    }
  }
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < 4; ++v) store(C + t * kTileRows + 16 * v, y[t][v]);
}
