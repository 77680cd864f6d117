// B (R R^T)^-1 as two sweeps over the columns of B: last to first for X R^T = B, first to last for
// Y R = X. What a block of 96 solved columns contributes to those still to come is a GEMM, within
// its slice of 384 at once and beyond it with the slice. Inside a block columns are substituted one
// by one, not multiplied by the block's inverse: only that is backward stable for any R.
#include "cholesky/cholesky.h"
#include "core/gemm.h"

#define DISTAYA_ISA_FILE "cholesky/solve_cpu.cpp"
#include "core/foreach_isa.h"

#ifndef DISTAYA_CHOLESKY_SOLVE
#define DISTAYA_CHOLESKY_SOLVE

namespace distaya::cpu {

constexpr int kTriangle = 96;  // columns of a block
constexpr int64_t kSolveSlice = kGemmDepth;
static_assert(kSolveSlice % kTriangle == 0);

// A diagonal block in the order in which its columns are solved:
// x_c = inverse[c] (b_c + sum over m < c of minus[m][c] x_m).
struct Triangle {
  alignas(64) float minus[kTriangle][kTriangle];
  float inverse[kTriangle];
  int w;          // columns
  bool backward;  // solved column c is column w - 1 - c of the block
};

}  // namespace distaya::cpu
#endif

#ifdef DISTAYA_ISA_PASS
#include "core/pack.h"

namespace distaya::DISTAYA_ISA {
namespace {

using cpu::kTriangle;
using cpu::Triangle;

constexpr int kGroup = kLanes == 16 ? 8 : 4;  // columns solved together, in registers
constexpr int kStrips = 2;                    // vectors of rows side by side
constexpr int kRows = kStrips * kLanes;
static_assert(kTriangle % kLanes == 0 && kTriangle % kGroup == 0);

using Turned = float[kTriangle][kRows];  // [solved column][row]

// `rows` <= kLanes rows of B, at the block's first column, to or from lanes s * kLanes .. of x.
template <bool put>
void turn(const Triangle& d, float* B, int64_t stride, int64_t rows, int s, Turned& x) {
  for (int c = 0; c < d.w; c += kLanes) {
    const int64_t n = std::min(kLanes, d.w - c);
    const auto solved = [&](int64_t q) { return d.backward ? d.w - 1 - c - q : c + q; };
    vf t[kLanes] = {};
    if constexpr (put)
      for (int64_t q = 0; q < n; ++q) t[q] = load(x[solved(q)] + s * kLanes);
    else
      for (int64_t r = 0; r < rows; ++r)
        t[r] = n < kLanes ? load_n(B + r * stride + c, n) : load(B + r * stride + c);
    transpose(t);
    if constexpr (put) {
      for (int64_t r = 0; r < rows; ++r) {
        if (n < kLanes)
          store_n(B + r * stride + c, t[r], n);
        else
          store(B + r * stride + c, t[r]);
      }
    } else {
      for (int64_t q = 0; q < n; ++q) store(x[solved(q)] + s * kLanes, t[q]);
    }
  }
}

void substitute(const Triangle& d, Turned& x) {
  for (int c = 0; c < d.w; c += kGroup) {
    vf sum[kGroup][kStrips];
#pragma GCC unroll 8
    for (int q = 0; q < kGroup; ++q)
#pragma GCC unroll 2
      for (int s = 0; s < kStrips; ++s) sum[q][s] = load(x[c + q] + s * kLanes);
    for (int m = 0; m < c; ++m) {
      vf done[kStrips];
#pragma GCC unroll 2
      for (int s = 0; s < kStrips; ++s) done[s] = load(x[m] + s * kLanes);
#pragma GCC unroll 8
      for (int q = 0; q < kGroup; ++q)
#pragma GCC unroll 2
        for (int s = 0; s < kStrips; ++s)
          sum[q][s] = fma(splat(d.minus[m][c + q]), done[s], sum[q][s]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kGroup; ++m)
#pragma GCC unroll 2
      for (int s = 0; s < kStrips; ++s) {
        sum[m][s] = sum[m][s] * splat(d.inverse[c + m]);
        store(x[c + m] + s * kLanes, sum[m][s]);
#pragma GCC unroll 8
        for (int q = m + 1; q < kGroup; ++q)
          sum[q][s] = fma(splat(d.minus[c + m][c + q]), sum[m][s], sum[q][s]);
      }
  }
}

}  // namespace

// Solves the block for `rows` rows at B, its first column.
void solve_block(const Triangle& d, float* B, int64_t stride, int64_t rows) {
  cpu::parallel_for((rows + kRows - 1) / kRows, [&](int64_t t) {
    alignas(64) Turned x;
    const int whole = (d.w + kGroup - 1) / kGroup * kGroup;
    std::memset(x[d.w], 0, static_cast<size_t>(whole - d.w) * sizeof(x[0]));
    float* from = B + t * kRows * stride;
    const auto rows_of = [&](int s) {
      return std::clamp<int64_t>(rows - t * kRows - s * kLanes, 0, kLanes);
    };
    for (int s = 0; s < kStrips; ++s)
      turn<false>(d, from + s * kLanes * stride, stride, rows_of(s), s, x);
    substitute(d, x);
    for (int s = 0; s < kStrips; ++s)
      turn<true>(d, from + s * kLanes * stride, stride, rows_of(s), s, x);
  });
}

}  // namespace distaya::DISTAYA_ISA

#else

namespace distaya {
namespace {

using cpu::kSolveSlice;
using cpu::kTriangle;
using cpu::Triangle;

void solve_block(const Triangle& d, float* B, int64_t stride, int64_t rows) {
  switch (cpu::isa()) {
    case cpu::Isa::avx512: return avx512::solve_block(d, B, stride, rows);
    case cpu::Isa::avx2: return avx2::solve_block(d, B, stride, rows);
    default: return portable::solve_block(d, B, stride, rows);
  }
}

// Columns [c, c + w) of B, to which all columns before them in the sweep have contributed.
void solve_columns(const Solve& p, int64_t c, int w, bool backward) {
  Triangle d;
  std::memset(&d, 0, sizeof d);
  d.w = w, d.backward = backward;
  const float* R = p.R + c * p.n + c;
  for (int i = 0; i < w; ++i) {
    const int at = backward ? w - 1 - i : i;
    d.inverse[at] = 1.0f / R[i * p.n + i];
    for (int j = i + 1; j < w; ++j)
      (backward ? d.minus[w - 1 - j][at] : d.minus[i][j]) = -R[i * p.n + j];
  }
  for (int at = w; at < kTriangle; ++at) d.inverse[at] = 1;
  solve_block(d, p.B + c, p.n, p.rows);
}

}  // namespace

void solve_cpu(const Solve& p) {
  for (int64_t end = p.n, begin; end > 0; end = begin) {
    begin = start_of(end, kSolveSlice);
    for (int64_t last = end, c; last > begin; last = c) {
      c = start_of(last, kTriangle);
      solve_columns(p, c, static_cast<int>(last - c), true);
      cpu::gemm(elimination<cpu::Gemm>(p, begin, c - begin, c, last - c, true));
    }
    cpu::gemm(elimination<cpu::Gemm>(p, 0, begin, begin, end - begin, true));
  }
  for (int64_t begin = 0, end; begin < p.n; begin = end) {
    end = std::min(p.n, begin + kSolveSlice);
    for (int64_t c = begin, next; c < end; c = next) {
      next = std::min<int64_t>(end, c + kTriangle);
      solve_columns(p, c, static_cast<int>(next - c), false);
      cpu::gemm(elimination<cpu::Gemm>(p, next, end - next, c, next - c, false));
    }
    cpu::gemm(elimination<cpu::Gemm>(p, end, p.n - end, begin, end - begin, false));
  }
}

}  // namespace distaya

#endif
