// Textual part of sqgemm_cpu.cpp, AVX2 and portable: a decoded tile times tokens. There is no
// vpdpbusd here. Codes of at most 4 bits fit vpmaddubsw, whose 16-bit sums hold a unit of 32
// columns (8 * 2 * 15 * 127 < 2^15); 8-bit codes, and all codes on SSE2, are widened to 16 bits
// first. All sums are exact, so every instruction set gives the same integers.

inline constexpr int kTogether = 2;  // tokens of a register tile
inline constexpr int kDown = 4;      // vectors of rows of a register tile

typedef int16_t vs __attribute__((vector_size(DISTAYA_LANES * 4)));

// Sums of the two products of neighbouring 16-bit numbers.
DISTAYA_INLINE vi pairs(vi a, vi b) {
#if DISTAYA_LANES == 8
  return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
}

DISTAYA_INLINE vi four_bytes(const int8_t* x) {
  int32_t word;
  std::memcpy(&word, x, sizeof word);
  return vi{} + word;
}

DISTAYA_INLINE vi load_codes(const void* p) {
  typedef int32_t any __attribute__((vector_size(DISTAYA_LANES * 4), aligned(4), may_alias));
  return *static_cast<const any*>(p);
}

// acc[v][t] += a unit of 32 columns; panel at the first of kDown vectors of rows, x at the first
// token.
template <int T>
DISTAYA_INLINE void unit_wide(const uint8_t* panel, const int8_t* x, vi (&acc)[kDown][T]) {
#pragma GCC unroll 1
  for (int j = 0; j < 8; ++j, panel += 4 * kTileRows, x += 4) {
    vi even[T], odd[T];
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) {
      const vs a = (vs)four_bytes(x + t * kTileCols);
      even[t] = (vi)((a << 8) >> 8), odd[t] = (vi)(a >> 8);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kDown; ++v) {
      const vi w = load_codes(panel + v * 4 * kLanes);
      const vi low = w & 0x00ff00ff, high = (vi)((vu)w >> 8) & 0x00ff00ff;
#pragma GCC unroll 2
      for (int t = 0; t < T; ++t) acc[v][t] += pairs(low, even[t]) + pairs(high, odd[t]);
    }
  }
}

#if DISTAYA_LANES == 8
template <int T>
DISTAYA_INLINE void unit_narrow(const uint8_t* panel, const int8_t* x, vi (&acc)[kDown][T]) {
  vs sum[kDown][T] = {};
#pragma GCC unroll 1  // unrolled, gcc 12 adds in another order and spills all products
  for (int j = 0; j < 8; ++j, panel += 4 * kTileRows, x += 4) {
    vi a[T];
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) a[t] = four_bytes(x + t * kTileCols);
#pragma GCC unroll 4
    for (int v = 0; v < kDown; ++v) {
      const vi w = load_codes(panel + v * 4 * kLanes);
#pragma GCC unroll 2
      for (int t = 0; t < T; ++t) sum[v][t] += (vs)_mm256_maddubs_epi16((__m256i)w, (__m256i)a[t]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kDown; ++v)
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) acc[v][t] += pairs((vi)sum[v][t], vi{} + 0x00010001);
}
#endif

// w * sum + y with one rounding on every instruction set.
DISTAYA_INLINE vf flush(vf w, vf sum, vf y) {
#if DISTAYA_LANES == 8
  return fma(w, sum, y);
#else
  for (int l = 0; l < kLanes; ++l) y[l] = std::fma(w[l], sum[l], y[l]);
  return y;
#endif
}

// C [T][64] += panel times T tokens; x, sums, scales: of the first token.
template <bool wide, int T>
void multiply(const uint8_t* panel, const Grid& grid, const int8_t* x, const int32_t* sums,
              const float* scales, float* C) {
  constexpr int kStep = kDown * kLanes;  // rows
  const int groups = grid.groups, units = 4 / groups;
  for (int row = 0; row < kTileRows; row += kStep)
    for (int q = 0, u = 0; q < groups; ++q) {
      vi acc[kDown][T] = {};
      for (const int end = u + units; u < end; ++u) {
        const uint8_t* codes = panel + u * 32 * kTileRows + row * 4;
#if DISTAYA_LANES == 8
        if constexpr (!wide) {
          unit_narrow<T>(codes, x + u * 32, acc);
          continue;
        }
#endif
        unit_wide<T>(codes, x + u * 32, acc);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kDown; ++v) {
        const int r = row + v * kLanes;
        const vf w = load(grid.scales + q * kTileRows + r);
        const vi zero = __builtin_convertvector(load(grid.zeros + q * kTileRows + r), vi);
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) {
          const int at = t * groups + q;
          float* y = C + t * kTileRows + r;
          const vf sum = __builtin_convertvector(acc[v][t] - zero * sums[at], vf);
          store(y, flush(w, sum * splat(scales[at]), load(y)));
        }
      }
    }
}

// The same for 1 <= n <= kTogether tokens.
template <Kind kind>
void multiply_tokens(int64_t n, const uint8_t* panel, const Grid& grid, const int8_t* x,
                     const int32_t* sums, const float* scales, Ahead next, float* C) {
  for (int64_t i = 0; i < next.bytes; i += 64) __builtin_prefetch(next.at + i);
  constexpr bool wide = kind == Kind::int8 || DISTAYA_LANES < 8;
  if (n == 1) return multiply<wide, 1>(panel, grid, x, sums, scales, C);
  multiply<wide, 2>(panel, grid, x, sums, scales, C);
}
