// What the kept weights should be once the mask is fixed, and masks that are chosen together with
// the weights, both from the second moment H of the inputs; no inverse is needed for the former.
//
// refit: per row, conjugate gradients on the kept weights S of it (Meng et al. 2024, "ALPS", the
// step after its masks), preconditioned by the diagonal (Jacobi):
//
//   least over Q that is 0 off the mask:  L(Q) = 1/2 E H' E^T,  E = T - Q,  H' = H + damp * mean I
//   r = (E H') on S;  z = r / D;  rz = r z;  p = z        D = diag H'
//   each step: y = p H' (one product for all rows);  a = rz / (p y);  Q += a p;  r -= a y on S
//              z = r / D;  beta = (r z) / rz;  rz = r z;  p = z + beta p
//   L falls by a rz / 2 in each step.
//
// H' is never stored: y = p H + (damp mean) p. If no diagonal entry is positive, 1 stands in for
// the mean, as in cholesky. A column with D_j = 0 is left as it was.
//
// Rounding, u = 2^-24. Let |x|_D^2 = sum x_j^2 D_j, k the columns and n the terms' worth of u that
// a product loses (core/gemm.h: at most 384 + k / 384; core/gemm.cuh: k / 16 + 48). As |H'_ij| <=
// sqrt(D_i D_j), the r that is carried along differs from that of the stored Q, in the norm in
// which |r|^2 = rz, by
//
//   drift <= (n + 4) u k (|E|_D + |Q|_D + sum over the steps of |a p|_D)
//
// at worst, E and Q those of the start. Errors have both signs, and no more was seen than
//
//   tau = u k size,   size^2 = |E|_D^2 + |Q|_D^2 + sum over the steps of |a p|_D^2
//
// (tests/test_refit.py). A step gains a (rz - 2 p drift) / 2, and |p|_D^2 = rz^2 sum 1 / rz over
// the steps so far (successive z are orthogonal): so a row stops as soon as 4 tau^2 sum 1 / rz >=
// 1, where one could no longer tell whether the step would gain.
// Hence L falls from step to step, in fp32; the last rounding, to W's dtype, is not in it. A row
// also stops where p y <= 0 (H' is not positive definite then). NaN spreads over its row.
//
// admm (Meng et al. 2024, section 3; Boza 2024, 2401.02938), on unit columns: d = sqrt(diag H), A =
// H / d / d^T + damp I with diagonal 1 + damp, Y = (T d) A. With G the weights, D = G where kept
// and U = G where pruned (the dual over rho), one iteration is
//
//   X = Y + rho (D - U);  G = X (A + rho I)^-1 + U;  mask = the largest |G|
//
// One array G holds both D and U, since what a projection leaves over is what it cuts. When rho
// changes, U is multiplied by the old over the new. As published but for rho, whose schedule is
// fixed: no decision waits for a value.
//
// Every sum has an order that follows from the shapes (and on the CPU the instruction set) alone.
#pragma once

#include <cstdint>
#include <optional>

#include "core/tensor.h"

namespace distaya {

struct Refit {
  int64_t rows, cols;
  const void* target;  // [rows, cols] T
  Dtype target_dtype;  // f32, bf16 or f16
  const bool* mask;    // [rows, cols] true = kept
  const float* H;      // [cols, cols] symmetric; both triangles are read
  const float* start;  // [rows, cols] Q to begin with (what is off the mask is not read); null: T
  double damp;
  int64_t iterations;
  void* out;  // [rows, cols] Q; 0 off the mask
  Dtype dtype;
  int64_t all_rows;  // of the matrix, where these are some of its rows: sums on CUDA as for all
  double* before;    // [rows] L of the start
  double* after;     // [rows] L of Q before it is rounded to dtype: before less what steps gained
  void* work;        // refit_work_cuda() bytes, 256-aligned; not used on the CPU
  int device;        // CUDA ordinal
};

// Rows are worked on in runs, so that scratch is a few times so many elements.
inline constexpr int64_t kRefitRunCpu = int64_t{1} << 23, kRefitRunCuda = int64_t{1} << 26;

inline int64_t rows_together(int64_t rows, int64_t cols, int64_t elements) {
  const int64_t fit = elements / (cols > 0 ? cols : 1);
  return fit < 1 ? 1 : fit < rows ? fit : rows;
}

// What a row carries from step to step.
struct Search {
  double rz;       // 0: the row has stopped, and p is 0
  double inverse;  // sum of 1 / rz
  double size;     // size^2 above
};

// unit: (u k)^2. NaN compares as false throughout and goes on.
DISTAYA_HD inline void stop_at_rounding(Search& s, double unit) {
  if (s.rz == 0 || 4 * unit * s.size * s.inverse >= 1) s.rz = 0;
}

DISTAYA_HD inline void begin_search(Search& s, double rz, double size, double unit) {
  s.rz = rz, s.inverse = 1 / rz, s.size = size;
  stop_at_rounding(s, unit);
}

// How far to go along p; 0 where the row has stopped or stops here.
DISTAYA_HD inline double step_length(Search& s, double py) {
  if (py <= 0) s.rz = 0;
  return s.rz == 0 ? 0 : s.rz / py;
}

// Takes the r z after a step of length a; how much of p the next p has.
DISTAYA_HD inline double continue_search(Search& s, double a, double rz, double unit) {
  s.size += a * a * s.rz * s.rz * s.inverse;
  const double beta = rz / s.rz;
  s.rz = rz, s.inverse += 1 / rz;
  stop_at_rounding(s, unit);
  return s.rz == 0 ? 0 : beta;
}

inline double rounding_unit(int64_t cols) {
  const double uk = 0x1p-24 * static_cast<double>(cols);
  return uk * uk;
}

struct Admm {
  int64_t rows, cols;
  float* G;              // [rows, cols]
  float* X;              // [rows, cols] scratch; |G| afterwards
  const bool* mask;      // [rows, cols] of G as it comes in
  const float* Y;        // [rows, cols]
  const float* inverse;  // [cols, cols] (A + rho I)^-1, symmetric
  float rho, ratio;      // ratio: the old rho over this one, 0 where there is no U yet
  int64_t all_rows;      // as in Refit
  int device;
};

struct Multiply {  // C += X B
  int64_t rows, cols;
  float* C;          // [rows, cols]
  const float* X;    // [rows, cols]
  const float* B;    // [cols, cols]
  int64_t all_rows;  // as in Refit
  int device;
};

void refit_cpu(const Refit& p);
void refit_cuda(const Refit& p, Stream stream);
int64_t refit_work_cuda(int64_t rows, int64_t cols);

void admm_cpu(const Admm& p);
void admm_cuda(const Admm& p, Stream stream);

void multiply_cpu(const Multiply& p);
void multiply_cuda(const Multiply& p, Stream stream);

// The doors (refit.cpp): checks, then one of the above. all_rows: 0 for those that are there.

void refit(const Tensor& target, const Tensor& mask, const Tensor& H,
           const std::optional<Tensor>& start, double damp, int64_t iterations, const Tensor& out,
           const Tensor& before, const Tensor& after, const Tensor& work, int64_t all_rows);

// Bytes of `work` that out [rows, cols] needs: 0 on the CPU.
int64_t refit_work(const Tensor& out);

void admm(const Tensor& G, const Tensor& X, const Tensor& mask, const Tensor& Y,
          const Tensor& inverse, double rho, double ratio, int64_t all_rows);

void multiply(const Tensor& C, const Tensor& X, const Tensor& B, int64_t all_rows);

}  // namespace distaya
