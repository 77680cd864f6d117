// Logits of bf16 rows by the instruction that multiplies pairs of bf16 (AVX512-BF16), at twice the
// rate of fp32. Its products are exact and added to an fp32 sum one after the other; what is below
// 2^-126 counts as 0. Read once per instruction set, after core/microkernel.h and core/pack.h.
//
// A word is two neighbours of a row. Rows are packed as [slices][tiles][kSteps][rows of a tile]
// words, so that a task finds everything of a slice of k in one piece.

namespace distaya::DISTAYA_ISA {

inline constexpr int64_t kSteps = 192;  // words of a slice: 384 products, as in core/gemm
inline constexpr int64_t kStripe = 128 / kMR, kGroup = 4;  // tiles of rows and columns per task

inline int64_t tiles(int64_t n, int64_t width) { return (n + width - 1) / width; }

inline int64_t slices_of(int64_t words) { return tiles(words, kSteps); }

// One tile from `words` words of each of its rows, null: zeros. out: of the tile in slice 0, the
// next slice being `slice` floats away.
template <int kWidth>
void pack_pairs(const bf16* const* rows, int64_t words, int64_t slice, float* out) {
  constexpr int kStore = kWidth < kLanes ? kWidth : kLanes;
  static_assert(kWidth % kStore == 0 && kSteps % kLanes == 0);
  for (int r0 = 0; r0 < kWidth; r0 += kLanes)
    for (int64_t s = 0; s < words; s += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, words - s);
      vf x[kLanes] = {};
#pragma GCC unroll 16
      for (int r = 0; r < kStore; ++r) {
        if (!rows[r0 + r]) continue;
        if (n == kLanes)
          std::memcpy(&x[r], rows[r0 + r] + 2 * s, sizeof(vf));
        else
          std::memcpy(&x[r], rows[r0 + r] + 2 * s, static_cast<size_t>(n) * 4);
      }
      transpose(x);
      float* to = out + s / kSteps * slice + s % kSteps * kWidth + r0;
      for (int64_t q = 0; q < n; ++q) std::memcpy(to + q * kWidth, &x[q], kStore * sizeof(float));
    }
}

// Packs rows [0, n) of `row`, kWidth to a tile.
template <int kWidth, class Row>
void pack_rows(int64_t n, int64_t hidden, float* out, const Row& row) {
  const int64_t slice = tiles(n, kWidth) * kSteps * kWidth;
  cpu::parallel_for(tiles(n, kWidth), [&](int64_t tile) {
    const bf16* rows[kWidth];
    for (int64_t r = 0; r < kWidth; ++r)
      rows[r] = tile * kWidth + r < n ? row(tile * kWidth + r) : nullptr;
    pack_pairs<kWidth>(rows, hidden / 2, slice, out + tile * kSteps * kWidth);
  });
}

// acc + the products of a word with kLanes words.
DISTAYA_INLINE vf add_pairs(const float* a, vf b, vf acc) {
#if DISTAYA_LANES == 16
  int32_t word;
  std::memcpy(&word, a, sizeof word);
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(word), (__m512bh)b);
#else
  return fma(splat(*a), b, acc);  // not called: words are pairs on AVX-512 alone
#endif
}

// C [kMR][kNR] = the products of a slice, added to C or not.
template <bool kAdd>
DISTAYA_INLINE void pair_tile(int64_t steps, const float* A, const float* B, float* C,
                              int64_t ldc) {
  vf acc[kMR][kNV];
#pragma GCC unroll 8
  for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < kNV; ++v) {
      acc[i][v] = vf{};
      __builtin_prefetch(C + i * ldc + v * kLanes, 1);
    }
#pragma GCC unroll 4
  for (int64_t s = 0; s < steps; ++s, A += kMR, B += kNR) {
    vf b[kNV];
#pragma GCC unroll 3
    for (int v = 0; v < kNV; ++v) b[v] = load(B + v * kLanes);
    __builtin_prefetch(B + 8 * kNR);
#pragma GCC unroll 8
    for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 3
      for (int v = 0; v < kNV; ++v) acc[i][v] = add_pairs(A + i, b[v], acc[i][v]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < kNV; ++v) {
      float* c = C + i * ldc + v * kLanes;
      store(c, kAdd ? load(c) + acc[i][v] : acc[i][v]);
    }
}

// C [row_tiles * kMR, ldc] = A B^T of packed rows; ldc >= col_tiles * kNR.
inline void multiply_pairs(const float* A, int64_t row_tiles, const float* B, int64_t col_tiles,
                           int64_t words, float* C, int64_t ldc) {
  const int64_t groups = (col_tiles + kGroup - 1) / kGroup;
  cpu::parallel_for((row_tiles + kStripe - 1) / kStripe * groups, [&](int64_t task) {
    const int64_t i0 = task / groups * kStripe, j0 = task % groups * kGroup;
    for (int64_t slice = 0; slice < slices_of(words); ++slice) {
      const int64_t steps = std::min(kSteps, words - slice * kSteps);
      for (int64_t j = j0; j < std::min(col_tiles, j0 + kGroup); ++j)
        for (int64_t i = i0; i < std::min(row_tiles, i0 + kStripe); ++i) {
          const float* a = A + (slice * row_tiles + i) * kSteps * kMR;
          const float* b = B + (slice * col_tiles + j) * kSteps * kNR;
          float* c = C + i * kMR * ldc + j * kNR;
          if (slice > 0)
            pair_tile<true>(steps, a, b, c, ldc);
          else
            pair_tile<false>(steps, a, b, c, ldc);
        }
    }
  });
}

}  // namespace distaya::DISTAYA_ISA
