// The register tile every matrix kernel is built on: C[kMR][kNR] (+)= sum_k A[k][0..kMR)
// B[k][0..kNR). AVX-512: 8 x 3 vectors, so 24 accumulators, 3 of B and a broadcast fill 28 of 32
// registers; AVX2: 4 x 3 fills its 16; SSE, whose FMA takes a scratch register more, 4 x 2. kMR
// divides kNR: the hessian room takes its left operand from a slice of the right one. Read once per
// instruction set.

namespace distaya::DISTAYA_ISA {

inline constexpr int kMR = kLanes == 16 ? 8 : 4;  // rows of the tile: operand broadcast from A
inline constexpr int kNV = kLanes == 4 ? 2 : 3;   // vectors per row
inline constexpr int kNR = kNV * kLanes;          // columns of the tile

// A: [k][kMR] packed, B: [k][kNR] packed, C: kMR rows of kNR floats, row stride ldc. C is asked for
// before the loop and touched after it, so its way from memory hides behind the FMAs.
// kAdd = false: C = A B, C is not read.
template <bool kAdd = true>
DISTAYA_INLINE void microkernel(int64_t k, const float* A, const float* B, float* C, int64_t ldc) {
  vf acc[kMR][kNV] = {};
  for (int i = 0; i < kMR; ++i) {
    for (int j = 0; j < kNR; j += 16) __builtin_prefetch(C + i * ldc + j, 1);
    __builtin_prefetch(C + i * ldc + kNR - 1, 1);
  }
#pragma GCC unroll 4
  for (int64_t p = 0; p < k; ++p) {
    vf b[kNV];
#pragma GCC unroll 3
    for (int v = 0; v < kNV; ++v) b[v] = load(B + v * kLanes);
    __builtin_prefetch(B + 8 * kNR);
#pragma GCC unroll 8
    for (int i = 0; i < kMR; ++i) {
      const vf a = splat(A[i]);
#pragma GCC unroll 3
      for (int v = 0; v < kNV; ++v) acc[i][v] = fma(a, b[v], acc[i][v]);
    }
    A += kMR;
    B += kNR;
  }
  for (int i = 0; i < kMR; ++i)
    for (int v = 0; v < kNV; ++v) {
      float* c = C + i * ldc + v * kLanes;
      store(c, kAdd ? load(c) + acc[i][v] : acc[i][v]);
    }
}

}  // namespace distaya::DISTAYA_ISA
