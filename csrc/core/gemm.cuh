// Products of fp32 matrices on tensor cores, by three products in tf32.
//
// Each operand x is taken apart as high + low + e: high is x rounded to tf32's 11 bits, low what is
// left, cut off to 11 bits; |low| <= 2^-11 |x| and |e| <= 2^-23 |x|. What is summed is low * high +
// high * low + high * high (Ootomo & Yokota 2022, "Recovering single precision accuracy from Tensor
// Cores while surpassing the FP32 theoretical peak performance"). Left out are low * low (at most
// 2^-22 |a| |b|) and the two e terms (2^-23 |a| |b| each): one product is off by 2^-21 |a| |b| at
// most.
//
// Tensor cores cut their fp32 sums off instead of rounding them (Fasi et al. 2021, "Numerical
// behavior of NVIDIA tensor cores"), an error of one sign that would grow with k. So they sum over
// 16 steps of k at most, from zero, by six instructions. Four of these add to a sum that is not
// small, in two rounds: four products and the sum are aligned, with two bits more than fp32 has
// since sm_80, and added: 5 / 4 + 1 last places of fp32 at most, 9 u of the sum of the absolute
// values for both rounds (u = 2^-24). Such sums of 16 are added up in ordinary fp32. With S = sum
// |a_p| |b_p|, alpha = 1 and C = 0 before, all this comes to
//
//   |C - A B| <= (k / 16 + 48) u S
//
// which is below the k u S of plain fp32 sums once k > 51. Simulated without the two bits
// (tests/test_cuda_sim_gemm.py) positive operands lose 3 u S on average, whatever k. It presumes
// that no low part underflows: operands of 2^-100 and less lose up to 2^-126 each, absolutely.
//
// Inf would come apart as Inf and NaN: an element of C whose sum is not finite is computed again in
// plain fp32, in the order of k, so that Inf and NaN spread exactly as there; it also makes good
// operands so large that rounding to tf32 overflows. An element of C depends on nothing but its row
// of A, its column of B and the tile, which follows from m (or m_all) and n.
#pragma once

#include "core/cuda.cuh"

namespace distaya::cuda {

// C[m, n] += alpha A[m, k] B[k, n]; C overlaps neither A nor B. Which thread sums what in which
// order follows from the sizes and strides alone, so the same operands give the same bits.
// Fast where one stride of each operand is 1, the other a multiple of 4 and the first element
// aligned to 16 bytes; sizes may be ragged. All else takes four times as many copies.
struct Gemm {
  int64_t m, n, k;
  float alpha;
  const float* A;
  int64_t a_row, a_col;  // element strides
  const float* B;
  int64_t b_row, b_col;
  float* C;  // row-major
  int64_t ldc;
  bool upper_only = false;  // leave C's elements below its diagonal alone
  bool overwrite = false;   // C = alpha A B: C is not read; but k = 0 leaves it alone
  bool lower_a = false;     // A[i, p] is 0 for p > i: such products are mostly left out
  int64_t m_all = 0;        // if not 0: these m rows are some of so many, whose sums they have
};

void gemm(const Gemm& g, cudaStream_t stream);

}  // namespace distaya::cuda
