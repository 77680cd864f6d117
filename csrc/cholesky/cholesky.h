// Reversed-order Cholesky of a Hessian and the inverses that follow from it.
//
//   H' = H + damp * mean(diag H) * I = R R^T,   R upper triangular
//
// Flipping both orders of H turns R into the ordinary lower factor; here nothing is flipped, the
// blocks are simply taken from the bottom-right corner up. U = R^-1 is upper too, and
// H'^-1 = U^T U: U is the factor that SparseGPT (Frantar & Alistarh 2023, section 3.3) and GPTQ
// (Frantar et al. 2022, section 3.3) obtain from two Cholesky factorisations and a full inverse.
//
// A pivot below floor * mean(diag H) is raised to it, and the couplings of its column to the
// columns before it (rounding noise by then: for a positive semidefinite Schur complement they are
// below sqrt(floor) of the diagonal) are dropped, since divided by a tiny pivot they would grow
// from column to column. If no diagonal entry is positive, 1 stands in for the mean.
//
// With u = 2^-24 and N = n + 3 on the CPU, max(n, 48) + 3 on CUDA (core/gemm.cuh says why: its sums
// are short and long ones gain, while the shortest lose a few bits of products), c of order 1:
//
//   |R R^T - H'|_ij <= c N u sqrt(H'_ii H'_jj),   |U - R^-1| <= c N u |R^-1| |R| |R^-1|,
//   |out - U^T U| <= N u |U|^T |U|.
//
// B (R R^T)^-1 needs no inverse: solve_ substitutes, also within blocks, so it is backward stable
// row by row (Higham 2002, theorem 8.5, once for each sweep), however small pivots are. With
// N = n + 3 on the CPU and n + 67 on CUDA, and X what B becomes,
//
//   |X R R^T - B| <= 2 N u |X| |R| |R|^T.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace distaya {

// info[0] floored pivots, [1] first floored column in processing order (last column first) or -1,
// info[2] first column found not finite or -1 (R is then meaningless), [3] zeros on H's diagonal.
enum Info { kFloored, kFirstFloored, kNotFinite, kDead, kInfo };

struct Cholesky {
  float* H;  // [n, n], upper triangle read; becomes R with zeros below the diagonal
  int64_t n;
  double damp, floor;  // relative to the mean of the diagonal
  int64_t* info;       // [kInfo]
  double* mean;        // [1] mean of H's diagonal
  float* work;         // [cholesky_work_cuda(n)]; not used on the CPU
};

// U = R^-1 for an upper triangular R with a nonzero diagonal; both [n, n].
struct InverseFactor {
  const float* R;
  float* U;
  int64_t n;
};

// out = U^T U, full and symmetric, for an upper triangular U; both [n, n].
struct Inverse {
  const float* U;
  float* out;
  int64_t n;
};

// B <- B (R R^T)^-1 for an upper triangular R [n, n] with a nonzero diagonal.
struct Solve {
  float* B;  // [rows, n]
  const float* R;
  int64_t rows, n;
  int64_t all_rows;  // of the matrix, where these are some of its rows: sums on CUDA as for all
};

// Where the last of the blocks of `size` columns that end before column `end` begins.
inline int64_t start_of(int64_t end, int64_t size) { return (end - 1) / size * size; }

// B[:, to:to+n] -= B[:, c:c+k] M, M = R[to:to+n, c:c+k]^T or R[c:c+k, to:to+n], as a product of
// either device (cpu::Gemm, cuda::Gemm).
template <class Gemm>
Gemm elimination(const Solve& p, int64_t to, int64_t n, int64_t c, int64_t k, bool backward) {
  return {.m = p.rows,
          .n = n,
          .k = k,
          .alpha = -1,
          .A = p.B + c,
          .a_row = p.n,
          .a_col = 1,
          .B = backward ? p.R + to * p.n + c : p.R + c * p.n + to,
          .b_row = backward ? 1 : p.n,
          .b_col = backward ? p.n : 1,
          .C = p.B + to,
          .ldc = p.n};
}

int64_t cholesky_work(const Tensor& H);  // floats of `work` that H [n, n] needs: 0 on the CPU
void cholesky_(Tensor H, double damp, double floor, Tensor info, Tensor mean, Tensor work);
void inverse_factor(Tensor R, Tensor U);
void inverse(Tensor U, Tensor out);
void solve_(Tensor B, Tensor R, int64_t all_rows);  // 0: as many as B has

void cholesky_cpu(const Cholesky& p);
void inverse_factor_cpu(const InverseFactor& p);
void inverse_cpu(const Inverse& p);
void solve_cpu(const Solve& p);

int64_t cholesky_work_cuda(int64_t n);
void cholesky_cuda(const Cholesky& p, Stream stream, int device);
void inverse_factor_cuda(const InverseFactor& p, Stream stream, int device);
void inverse_cuda(const Inverse& p, Stream stream, int device);
void solve_cuda(const Solve& p, Stream stream, int device);

}  // namespace distaya
