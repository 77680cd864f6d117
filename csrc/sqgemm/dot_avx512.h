// Textual part of sqgemm_cpu.cpp, AVX-512 only: a decoded tile times tokens.

inline constexpr int kTogether = 6;  // tokens of a register tile: 24 sums, 4 of codes, 1 broadcast

DISTAYA_INLINE vi four_bytes(const int8_t* x) {
  int32_t word;
  std::memcpy(&word, x, sizeof word);
  return (vi)_mm512_set1_epi32(word);
}

// acc += four codes times four activations, in each lane. (gcc 12 keeps the sums of the intrinsic
// on the stack.)
DISTAYA_INLINE void dot(vi& acc, vi codes, vi x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x));
}

// C [T][64] += panel times tokens; x, sums, scales: of the first token.
template <int T>
void multiply(const uint8_t* panel, const Grid& grid, const int8_t* x, const int32_t* sums,
              const float* scales, Ahead next, float* C) {
  const int groups = grid.groups, steps = 32 / groups;
  for (int q = 0; q < groups; ++q) {
    vi acc[4][T];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const vi zero = __builtin_convertvector(load(grid.zeros + q * kTileRows + 16 * v), vi);
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) acc[v][t] = zero * -sums[t * groups + q];
    }
    for (int k = 0; k < steps; ++k, panel += 256, x += 4) {
      __builtin_prefetch(next.at);
      __builtin_prefetch(next.at + 64);
      next.at += next.bytes / 32;
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
}

// The same for 1 <= n <= kTogether tokens. (8-bit codes need no care here.)
template <Kind>
void multiply_tokens(int64_t n, const uint8_t* panel, const Grid& grid, const int8_t* x,
                     const int32_t* sums, const float* scales, Ahead next, float* C) {
  switch (n) {
    case 1: return multiply<1>(panel, grid, x, sums, scales, next, C);
    case 2: return multiply<2>(panel, grid, x, sums, scales, next, C);
    case 3: return multiply<3>(panel, grid, x, sums, scales, next, C);
    case 4: return multiply<4>(panel, grid, x, sums, scales, next, C);
    case 5: return multiply<5>(panel, grid, x, sums, scales, next, C);
    default: return multiply<6>(panel, grid, x, sums, scales, next, C);
  }
}
