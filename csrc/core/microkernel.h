// The register tile every matrix kernel is built on: C[kMR][kNR] += sum_k A[k][0..kMR)
// B[k][0..kNR). kNR is three vectors wide so that AVX-512 keeps 24 accumulators, 3 B vectors and a
// broadcast in its 32 registers (AVX2: 12 + 3 + 1 of 16) and every B load feeds kMR FMAs. Read once
// per instruction set.

namespace distaya::DISTAYA_ISA {

inline constexpr int kMR = kLanes == 16 ? 8 : 4;  // rows of the tile: operand broadcast from A
inline constexpr int kNV = 3;                     // vectors per row
inline constexpr int kNR = kNV * kLanes;          // columns of the tile

// A: [k][kMR] packed, B: [k][kNR] packed, C: kMR rows of kNR floats, row stride ldc.
DISTAYA_INLINE void microkernel(int64_t k, const float* A, const float* B, float* C, int64_t ldc) {
  vf acc[kMR][kNV];
  for (int i = 0; i < kMR; ++i)
    for (int v = 0; v < kNV; ++v) acc[i][v] = load(C + i * ldc + v * kLanes);
#pragma GCC unroll 4
  for (int64_t p = 0; p < k; ++p) {
    const vf b0 = load(B), b1 = load(B + kLanes), b2 = load(B + 2 * kLanes);
    __builtin_prefetch(B + 8 * kNR);
#pragma GCC unroll 8
    for (int i = 0; i < kMR; ++i) {
      const vf a = splat(A[i]);
      acc[i][0] = fma(a, b0, acc[i][0]);
      acc[i][1] = fma(a, b1, acc[i][1]);
      acc[i][2] = fma(a, b2, acc[i][2]);
    }
    A += kMR;
    B += kNR;
  }
  for (int i = 0; i < kMR; ++i)
    for (int v = 0; v < kNV; ++v) store(C + i * ldc + v * kLanes, acc[i][v]);
}

}  // namespace distaya::DISTAYA_ISA
