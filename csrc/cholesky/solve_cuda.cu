// B (R R^T)^-1 by the sweeps of solve_cpu.cpp, with blocks of 128 columns and slices of 256: a
// launch substitutes within a block, another subtracts what the block contributes to those still to
// come.
//
// Substitution of a block by thread blocks of 32 rows and four warps. A lane has a row, a warp 32
// columns, in registers; R lies in shared memory and is read by all lanes at once. A warp solves
// its square as soon as the ones before have subtracted theirs. Counted: 496 multiply-adds from
// square to square and then 1024 of the other warps, so some 6000 clocks for a block, of which two
// or three run on an SM.
#include "cholesky/block.cuh"
#include "cholesky/cholesky.h"

namespace distaya {
namespace {

using namespace cuda;

constexpr int64_t kSlice = 2 * kBlock;
constexpr int kThreads = kSquares * 32, kRows = 32;

// In the order in which columns are solved, forth or back: with m before c,
// x_c = inverse[c] (b_c + sum of minus(m, c) x_m).
struct Substitution {
  // Rows of 32 m, each without the squares below the diagonal; the padding spreads the rows over
  // the banks, for when they are written by columns.
  float minus[kSquare * (kSquares * (kSquares + 1) / 2 * kSquare + 4 * kSquares)];
  float inverse[kBlock];
  float x[kSquares][kSquare][kRows + 1];  // [square][column][row]: as read, and then solved

  // Element (m, 32 q) of row m.
  __device__ float* row(int m, int q) {
    const int a = m / kSquare, length = kBlock - a * kSquare + 4;
    const int before = a * (kBlock + 4) - a * (a - 1) / 2 * kSquare;
    return minus + kSquare * before + m % kSquare * length + (q - a) * kSquare;
  }
};

// The diagonal block at R, w x w; beyond w the identity.
template <bool backward>
__device__ void load_triangle(Substitution& s, const float* R, int64_t n, int w) {
#pragma unroll 8
  for (int t = threadIdx.x; t < kBlock * kBlock; t += kThreads) {
    const int i = t / kBlock, j = t % kBlock;  // row and column of R: neighbours read neighbours
    // Where (i, j) stands in the order of solving, m before c where i < j.
    const int first = backward ? (w - 1 - i + kBlock) % kBlock : i;
    const int second = backward ? (w - 1 - j + kBlock) % kBlock : j;
    const int m = backward ? second : first, c = backward ? first : second;
    if (m / kSquare > c / kSquare) continue;
    const bool there = i <= j && j < w;
    const float r = there ? R[i * n + j] : 0.f;
    s.row(m, c / kSquare)[c % kSquare] = i < j ? -r : 0.f;
    if (i == j) s.inverse[c] = there ? 1.f / r : 1.f;
  }
}

// x[c] += sum over m of minus(32 from + m, 32 q + c) * (solved column m of square `from`).
__device__ void subtract(Substitution& s, int from, int q, float (&x)[kSquare]) {
  const int lane = threadIdx.x % 32;
#pragma unroll 2
  for (int m = 0; m < kSquare; ++m) {
    const float solved = s.x[from][m][lane];
    const float4* minus = reinterpret_cast<const float4*>(s.row(from * kSquare + m, q));
#pragma unroll
    for (int c = 0; c < kSquare / 4; ++c) {
      const float4 r = minus[c];
      x[4 * c] = fmaf(r.x, solved, x[4 * c]), x[4 * c + 1] = fmaf(r.y, solved, x[4 * c + 1]);
      x[4 * c + 2] = fmaf(r.z, solved, x[4 * c + 2]);
      x[4 * c + 3] = fmaf(r.w, solved, x[4 * c + 3]);
    }
  }
}

// The square's own triangle.
__device__ void substitute(Substitution& s, int q, float (&x)[kSquare]) {
#pragma unroll
  for (int m = 0; m < kSquare; ++m) {
    x[m] *= s.inverse[q * kSquare + m];
    const float* minus = s.row(q * kSquare + m, q);
#pragma unroll
    for (int c = m + 1; c < kSquare; ++c) x[c] = fmaf(minus[c], x[m], x[c]);
  }
}

// Columns [c, c + w) of B, to which all columns before them in the sweep have contributed.
template <bool backward>
__global__ void __launch_bounds__(kThreads) solve_block_kernel(const Solve p, int64_t c, int w) {
  DISTAYA_DYNAMIC_SHARED(float, shared);
  Substitution& s = *reinterpret_cast<Substitution*>(shared);
  const int lane = threadIdx.x % 32, q = threadIdx.x / 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows, left = p.rows - first;
  const int rows = left < kRows ? static_cast<int>(left) : kRows;
  const int solved = q * kSquare + lane;  // the column that this lane brings and takes away
  const bool there = solved < w;
  float* B = p.B + first * p.n + c + (backward ? w - 1 - solved : solved);
#pragma unroll 8
  for (int r = 0; r < kRows; ++r) s.x[q][lane][r] = there && r < rows ? B[r * p.n] : 0.f;
  load_triangle<backward>(s, p.R + c * p.n + c, p.n, w);
  __syncthreads();
  float x[kSquare];
#pragma unroll
  for (int k = 0; k < kSquare; ++k) x[k] = s.x[q][k][lane];
#pragma unroll 1
  for (int from = 0; from < kSquares; ++from) {
    if (q == from) {
      substitute(s, q, x);
#pragma unroll
      for (int k = 0; k < kSquare; ++k) s.x[q][k][lane] = x[k];
    }
    __syncthreads();
    if (q > from) subtract(s, from, q, x);
  }
  if (!there) return;
#pragma unroll 8
  for (int r = 0; r < rows; ++r) B[r * p.n] = s.x[q][lane][r];
}

template <bool backward>
void solve_columns(const Solve& p, int64_t c, int64_t w, cudaStream_t stream) {
  constexpr int kShared = sizeof(Substitution);
  need_shared(solve_block_kernel<backward>, kShared);
  launch(solve_block_kernel<backward>, grid_of(ceil_div<int64_t>(p.rows, kRows)), kThreads, kShared,
         stream, p, c, static_cast<int>(w));
}

}  // namespace

void solve_cuda(const Solve& p, Stream s, int device) {
  const DeviceGuard guard(device);
  const cudaStream_t stream = raw(s);
  const int64_t blocks = ceil_div<int64_t>(p.rows, kRows);
  check(blocks <= int64_t{1} << 30, "B of ", p.rows, " rows exceeds the CUDA grid");
  const auto eliminate = [&](int64_t to, int64_t n, int64_t c, int64_t k, bool backward) {
    Gemm g = elimination<Gemm>(p, to, n, c, k, backward);
    g.m_all = p.all_rows;
    gemm(g, stream);
  };
  for (int64_t end = p.n, begin; end > 0; end = begin) {
    begin = start_of(end, kSlice);
    for (int64_t last = end, c; last > begin; last = c) {
      c = start_of(last, kBlock);
      solve_columns<true>(p, c, last - c, stream);
      eliminate(begin, c - begin, c, last - c, true);
    }
    eliminate(0, begin, begin, end - begin, true);
  }
  for (int64_t begin = 0, end; begin < p.n; begin = end) {
    end = begin + kSlice < p.n ? begin + kSlice : p.n;
    for (int64_t c = begin, next; c < end; c = next) {
      next = c + kBlock < end ? c + kBlock : end;
      solve_columns<false>(p, c, next - c, stream);
      eliminate(next, end - next, c, next - c, false);
    }
    eliminate(end, p.n - end, begin, end - begin, false);
  }
}

}  // namespace distaya
