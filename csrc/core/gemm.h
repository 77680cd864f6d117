// C += alpha A B in fp32 on the CPU: the workhorse of the Cholesky and OBS rooms.
#pragma once

#include <cstdint>

namespace distaya::cpu {

enum class Part { all, upper };  // upper: only tiles that touch j >= i are computed (SYRK-like)

// Element (i, p) of A is A[i * a_row + p * a_col], likewise B; C is row-major with row stride ldc.
// Every element of C is summed over k in the same order whatever the thread count.
struct Gemm {
  int64_t m, n, k;
  float alpha;  // applied while A is packed
  const float* A;
  int64_t a_row, a_col;
  const float* B;
  int64_t b_row, b_col;
  float* C;
  int64_t ldc;
  Part part = Part::all;
};

void gemm(const Gemm& g);

}  // namespace distaya::cpu
