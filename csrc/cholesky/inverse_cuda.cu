// U = R^-1 with the blocks and slices of cholesky_cuda.cu, and U^T U.
#include "cholesky/block.cuh"
#include "cholesky/cholesky.h"

namespace distaya {
namespace {

using namespace cuda;

constexpr int64_t kSlice = 2 * kBlock;
constexpr int kThreads = kGemmThreads;

// A square of 32 of R, upright in shared memory, and its inverse, by one warp: lane i has column i.
__device__ void invert_square(Diagonal& d, int square) {
  const int lane = threadIdx.x % 32;
  const float* R = d.square(square, square);
  float* V = d.V[square];
  for (int j = kSquare - 1; j >= 0; --j) {
    float sum = 0;
    for (int m = j + 1; m <= lane; ++m)
      sum = fmaf(R[j * kStride + m], V[m * kSquareStride + lane], sum);
    V[j * kSquareStride + lane] =
        j > lane ? 0.f : ((j == lane ? 1.f : 0.f) - sum) / R[j * kStride + j];
  }
}

// Block b inverts diagonal block b of R into U.
__global__ void __launch_bounds__(kThreads) invert_diagonal_kernel(const InverseFactor p) {
  DISTAYA_DYNAMIC_SHARED(float, shared);
  Diagonal& d = *reinterpret_cast<Diagonal*>(shared);
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kBlock;
  const int w = static_cast<int>(p.n - c < kBlock ? p.n - c : kBlock);
  load_block(d, p.R + c * p.n + c, p.n, w);
  if (threadIdx.x / 32 < kSquares) invert_square(d, threadIdx.x / 32);
  __syncthreads();
  for (int i = kSquares - 2; i >= 0; --i) {
    sum_rows(d, i, 0, 8);
    __syncthreads();
    finish_rows(d, i, 0, 8);
    __syncthreads();
  }
  for (int t = threadIdx.x; t < kBlock * kBlock; t += kThreads) {
    const int i = t / kBlock, j = t % kBlock;
    if (i <= j && j < w) p.U[(c + i) * p.n + c + j] = inverse_at(d, i, j);
  }
}

// In place: a thread block has all rows of its columns.
using RowsTile = TileShape<kBlock, 32, 32, 3, 4, 1, 2>;

// S <- -D S for the rows right of the diagonal block D at U's (c, c), which has w columns.
__global__ void __launch_bounds__(kThreads, RowsTile::kBlocks)
    finish_rows_kernel(float* U, int64_t n, int64_t c, int w) {
  DISTAYA_DYNAMIC_SHARED(float, shared);
  const float* D = U + c * n + c;
  float* S = U + c * n + c + w;
  const Gemm g{w, n - c - w, w, -1, D, n, 1, S, n, 1, S, n, false, true};
  const TileProduct<RowsTile, true, false> tile(
      g, 0, static_cast<int64_t>(blockIdx.x) * RowsTile::kCols, shared);
  tile.store<false>(g);
}

// The lower triangle as the mirror image of the upper: block (x, y) reads tile (y, x), y >= x.
__global__ void __launch_bounds__(kThreads) mirror_kernel(float* H, int64_t n) {
  constexpr int kSide = 64;
  __shared__ float tile[kSide][kSide + 1];  // read by columns too: no two rows on one bank
  for (int64_t y = blockIdx.y; y * kSide < n; y += gridDim.y) {
    const int64_t i0 = static_cast<int64_t>(blockIdx.x) * kSide, j0 = y * kSide;
    if (j0 < i0) continue;  // the same for the whole block
    for (int t = threadIdx.x; t < kSide * kSide; t += kThreads) {
      const int64_t i = i0 + t / kSide, j = j0 + t % kSide;
      tile[t / kSide][t % kSide] = i < n && j < n ? H[i * n + j] : 0.f;
    }
    __syncthreads();
    for (int t = threadIdx.x; t < kSide * kSide; t += kThreads) {
      const int64_t j = j0 + t / kSide, i = i0 + t % kSide;
      if (i < n && j < n && i < j) H[j * n + i] = tile[t % kSide][t / kSide];
    }
    __syncthreads();
  }
}

}  // namespace

void inverse_factor_cuda(const InverseFactor& p, Stream s, int device) {
  const int64_t n = p.n;
  if (n == 0) return;
  const DeviceGuard guard(device);
  const cudaStream_t stream = raw(s);
  constexpr int kOwn = sizeof(Diagonal), kRows = TileProduct<RowsTile, true, false>::kShared;
  need_shared(invert_diagonal_kernel, kOwn);
  need_shared(finish_rows_kernel, kRows);
  // U[from:from+rows, c:] += R[from:from+rows, c:c+k] U[c:c+k, c:]
  const auto accumulate = [&](int64_t from, int64_t rows, int64_t c, int64_t k) {
    const float *A = p.R + from * n + c, *B = p.U + c * n + c;
    gemm({rows, n - c, k, 1, A, n, 1, B, n, 1, p.U + from * n + c, n}, stream);
  };
  check_cuda(cudaMemsetAsync(p.U, 0, static_cast<size_t>(n) * n * sizeof(float), stream));
  launch(invert_diagonal_kernel, grid_of(ceil_div<int64_t>(n, kBlock)), kThreads, kOwn, stream, p);
  for (int64_t end = n; end > 0;) {
    const int64_t begin = start_of(end, kSlice);
    for (int64_t last = end, c; last > begin; last = c) {
      c = start_of(last, kBlock);
      if (last < n)
        launch(finish_rows_kernel, grid_of(ceil_div<int64_t>(n - last, RowsTile::kCols)), kThreads,
               kRows, stream, p.U, n, c, static_cast<int>(last - c));
      accumulate(begin, c - begin, c, last - c);
    }
    accumulate(0, begin, begin, end - begin);
    end = begin;
  }
}

// One launch for the product: row i of U^T has nothing right of column i.
void inverse_cuda(const Inverse& p, Stream s, int device) {
  const int64_t n = p.n;
  if (n == 0) return;
  const DeviceGuard guard(device);
  const cudaStream_t stream = raw(s);
  gemm({.m = n,
        .n = n,
        .k = n,
        .alpha = 1,
        .A = p.U,
        .a_row = 1,
        .a_col = n,
        .B = p.U,
        .b_row = n,
        .b_col = 1,
        .C = p.out,
        .ldc = n,
        .upper_only = true,
        .overwrite = true,
        .lower_a = true},
       stream);
  const unsigned tiles = grid_of(ceil_div<int64_t>(n, 64));
  launch(mirror_kernel, dim3(tiles, tiles < 65535 ? tiles : 65535), kThreads, 0, stream, p.out, n);
}

}  // namespace distaya
