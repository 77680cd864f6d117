// C += alpha A B (or C = alpha A B), fp32, on the CPU: workhorse of the Cholesky and OBS rooms.
#pragma once

#include <cstdint>

namespace distaya::cpu {

inline constexpr int64_t kGemmDepth = 384;  // depth of a packed slice: C is touched once per slice
inline constexpr int64_t kGemmInPlace = 384;  // so many columns are never cut into several tasks

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
  bool add = true;  // false: C = alpha A B. Then C may be B itself when k <= kGemmDepth, and A
                    // itself when n <= kGemmInPlace too: both are packed before C is written
};

void gemm(const Gemm& g);

}  // namespace distaya::cpu
