// The CPU room's scheme with blocks of 64 in slices of 256: one thread block finishes a diagonal
// block in shared memory, the rows above are multiplied by its inverse, GEMMs do the rest. Every
// number has one order of summation, nothing is read back by the host.
#include <algorithm>

#include "cholesky/cholesky.h"
#include "core/cuda.cuh"
#include "core/gemm.cuh"

namespace distaya {
namespace {

using cuda::check_cuda;
using cuda::Gemm;
using cuda::gemm;
using cuda::grid_of;
using cuda::launch;

constexpr int kBlock = 64;        // A and its inverse take 33 KB of shared memory
constexpr int64_t kSlice = 256;   // depth of the trailing update
constexpr int kPad = kBlock + 1;  // columns are walked too: no two rows on one bank
constexpr int kThreads = 256;

__device__ double unit_of(const double* mean) { return *mean > 0 ? *mean : 1.0; }

// One block: statistics of the diagonal in a fixed order, then the damping.
__global__ void __launch_bounds__(kThreads) prepare_kernel(const Cholesky p) {
  __shared__ double sums[kThreads];
  __shared__ int64_t dead[kThreads], bad[kThreads];
  const int t = threadIdx.x;
  double sum = 0;
  int64_t zeros = 0, first = p.n;
  for (int64_t j = t; j < p.n; j += kThreads) {
    const float d = p.H[j * p.n + j];
    sum += d;
    zeros += d == 0;
    if (!isfinite(d) && j < first) first = j;
  }
  sums[t] = sum, dead[t] = zeros, bad[t] = first;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (t < width) {
      sums[t] += sums[t + width];
      dead[t] += dead[t + width];
      bad[t] = bad[t] < bad[t + width] ? bad[t] : bad[t + width];
    }
    __syncthreads();
  }
  if (t == 0) {
    *p.mean = p.n ? sums[0] / static_cast<double>(p.n) : 0.0;
    p.info[kFloored] = 0, p.info[kFirstFloored] = -1;
    p.info[kNotFinite] = bad[0] < p.n ? bad[0] : -1, p.info[kDead] = dead[0];
  }
  __syncthreads();
  const float damp = static_cast<float>(p.damp * unit_of(p.mean));
  for (int64_t j = t; j < p.n; j += kThreads) p.H[j * p.n + j] += damp;
}

// U = R^-1 within a block, both in shared memory: four neighbouring threads per column, which is
// solved from its diagonal up. U's strict lower triangle becomes zero.
__device__ void invert_block(const float (*R)[kPad], float (*U)[kPad], int w) {
  const int col = threadIdx.x / 4, part = threadIdx.x % 4;
  for (int i = kBlock - 1; i >= 0; --i) {
    float sum = 0;
    if (i < w && col < w)
      for (int m = i + 1 + part; m <= col; m += 4) sum = fmaf(R[i][m], U[m][col], sum);
    sum += __shfl_xor_sync(cuda::kFullWarp, sum, 1);
    sum += __shfl_xor_sync(cuda::kFullWarp, sum, 2);
    if (part == 0)
      U[i][col] = i >= w || col >= w || i > col ? 0.f : ((i == col ? 1.f : 0.f) - sum) / R[i][i];
    __syncwarp();  // the column's other three threads read it next
  }
  __syncthreads();
}

// Upper triangle of the w x w block at `from` (row stride n); zero elsewhere.
__device__ void load_block(const float* from, int64_t n, int w, float (*out)[kPad]) {
  for (int t = threadIdx.x; t < kBlock * kBlock; t += kThreads) {
    const int i = t / kBlock, j = t % kBlock;
    out[i][j] = i <= j && j < w ? from[i * n + j] : 0.f;
  }
  __syncthreads();
}

// One block: factors the diagonal block at column c and leaves its inverse in p.work, with the rows
// of floored columns zeroed so that their couplings vanish.
__global__ void __launch_bounds__(kThreads) factor_kernel(const Cholesky p, int64_t c, int w) {
  __shared__ float A[kBlock][kPad], U[kBlock][kPad];
  __shared__ bool dropped[kBlock];
  float* block = p.H + c * p.n + c;
  load_block(block, p.n, w, A);
  const float least =
      fmaxf(static_cast<float>(p.floor * unit_of(p.mean)), 1.17549435e-38f);  // smallest normal
  const int t = threadIdx.x;
  for (int j = w - 1; j >= 0; --j) {
    const float pivot = A[j][j];
    const bool finite = isfinite(pivot), drop = finite && pivot < least;
    const float root = sqrtf(drop ? least : pivot), inverse = drop ? 0.f : 1.f / root;
    __syncthreads();  // all have read the pivot
    if (t < j) A[t][j] *= inverse;
    if (t == j) {
      A[j][j] = root;
      dropped[j] = drop;
      if (drop && p.info[kFloored]++ == 0) p.info[kFirstFloored] = c + j;
      if (!finite && p.info[kNotFinite] < 0) p.info[kNotFinite] = c + j;
    }
    __syncthreads();
    for (int e = t; e < j * kBlock; e += kThreads) {
      const int i = e / kBlock, l = e % kBlock;
      if (i <= l && l < j) A[i][l] = fmaf(-A[i][j], A[l][j], A[i][l]);
    }
    __syncthreads();
  }
  invert_block(A, U, w);
  for (int e = t; e < kBlock * kBlock; e += kThreads) {
    const int i = e / kBlock, j = e % kBlock;
    p.work[e] = i < w && !dropped[i] ? U[i][j] : 0.f;
    if (i <= j && j < w) block[i * p.n + j] = A[i][j];
  }
}

// X <- X U^T for 64 rows of the panel above a diagonal block, in place (a block owns its rows).
__global__ void __launch_bounds__(kThreads)
    panel_kernel(float* X, int64_t n, int64_t rows, int w, const float* inverse) {
  __shared__ float x[kBlock][kPad], u[kBlock][kPad];
  const int64_t i0 = static_cast<int64_t>(blockIdx.x) * kBlock;
  for (int t = threadIdx.x; t < kBlock * kBlock; t += kThreads) {
    const int i = t / kBlock, j = t % kBlock;
    x[i][j] = i0 + i < rows && j < w ? X[(i0 + i) * n + j] : 0.f;
    u[i][j] = inverse[t];
  }
  __syncthreads();
  for (int t = threadIdx.x; t < kBlock * kBlock; t += kThreads) {
    const int i = t / kBlock, j = t % kBlock;
    float sum = 0;
    for (int q = j; q < w; ++q) sum = fmaf(x[i][q], u[j][q], sum);
    if (i0 + i < rows && j < w) X[(i0 + i) * n + j] = sum;
  }
}

__global__ void __launch_bounds__(kThreads) clear_lower_kernel(float* H, int64_t n) {
  for (int64_t i = blockIdx.x; i < n; i += gridDim.x)
    for (int64_t j = threadIdx.x; j < i; j += kThreads) H[i * n + j] = 0;
}

// Block b inverts diagonal block b of R into U.
__global__ void __launch_bounds__(kThreads) invert_diagonal_kernel(const InverseFactor p) {
  __shared__ float R[kBlock][kPad], U[kBlock][kPad];
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kBlock;
  const int w = static_cast<int>(p.n - c < kBlock ? p.n - c : kBlock);
  load_block(p.R + c * p.n + c, p.n, w, R);
  invert_block(R, U, w);
  for (int t = threadIdx.x; t < kBlock * kBlock; t += kThreads) {
    const int i = t / kBlock, j = t % kBlock;
    if (i <= j && j < w) p.U[(c + i) * p.n + c + j] = U[i][j];
  }
}

// S <- -D S for the rows right of diagonal block D (w x w upper, at U), 64 columns a block.
__global__ void __launch_bounds__(kThreads)
    finish_rows_kernel(float* U, int64_t n, int w, int64_t cols) {
  __shared__ float d[kBlock][kPad], s[kBlock][kPad];
  const int64_t j0 = w + static_cast<int64_t>(blockIdx.x) * kBlock, end = w + cols;
  for (int t = threadIdx.x; t < kBlock * kBlock; t += kThreads) {
    const int i = t / kBlock, j = t % kBlock;
    d[i][j] = i <= j && j < w ? U[i * n + j] : 0.f;
    s[i][j] = i < w && j0 + j < end ? U[i * n + j0 + j] : 0.f;
  }
  __syncthreads();
  for (int t = threadIdx.x; t < kBlock * kBlock; t += kThreads) {
    const int i = t / kBlock, j = t % kBlock;
    float sum = 0;
    for (int q = i; q < w; ++q) sum = fmaf(d[i][q], s[q][j], sum);
    if (i < w && j0 + j < end) U[i * n + j0 + j] = -sum;
  }
}

// The lower triangle as the mirror image of the upper: block (x, y) reads tile (y, x), y >= x.
__global__ void __launch_bounds__(kThreads) mirror_kernel(float* H, int64_t n) {
  __shared__ float tile[kBlock][kPad];
  for (int64_t y = blockIdx.y; y * kBlock < n; y += gridDim.y) {
    const int64_t i0 = static_cast<int64_t>(blockIdx.x) * kBlock, j0 = y * kBlock;
    if (j0 < i0) continue;  // the same for the whole block
    for (int t = threadIdx.x; t < kBlock * kBlock; t += kThreads) {
      const int64_t i = i0 + t / kBlock, j = j0 + t % kBlock;
      tile[t / kBlock][t % kBlock] = i < n && j < n ? H[i * n + j] : 0.f;
    }
    __syncthreads();
    for (int t = threadIdx.x; t < kBlock * kBlock; t += kThreads) {
      const int64_t j = j0 + t / kBlock, i = i0 + t % kBlock;
      if (i < n && j < n && i < j) H[j * n + i] = tile[t % kBlock][t / kBlock];
    }
    __syncthreads();
  }
}

unsigned blocks(int64_t n) { return grid_of(cuda::ceil_div<int64_t>(n, kBlock)); }

int64_t start_of(int64_t end, int64_t size) { return (end - 1) / size * size; }

}  // namespace

int64_t cholesky_work_cuda(int64_t) { return kBlock * kBlock; }  // a diagonal block's inverse

void cholesky_cuda(const Cholesky& p, Stream s, int device) {
  const cuda::DeviceGuard guard(device);
  const cudaStream_t stream = cuda::raw(s);
  // H[0:rows, to:rows] -= R[0:rows, c:c+k] R[to:rows, c:c+k]^T
  const auto update = [&](int64_t rows, int64_t to, int64_t c, int64_t k, bool upper) {
    float *R = p.H + c, *C = p.H + to;
    gemm({rows, rows - to, k, -1, R, p.n, 1, R + to * p.n, 1, p.n, C, p.n, upper}, stream);
  };
  launch(prepare_kernel, 1, kThreads, 0, stream, p);
  for (int64_t end = p.n; end > 0;) {
    const int64_t begin = start_of(end, kSlice);
    for (int64_t last = end, c; last > begin; last = c) {
      c = start_of(last, kBlock);
      const int w = static_cast<int>(last - c);
      launch(factor_kernel, 1, kThreads, 0, stream, p, c, w);
      if (c == 0) break;
      launch(panel_kernel, blocks(c), kThreads, 0, stream, p.H + c, p.n, c, w, p.work);
      update(c, begin, c, w, false);
    }
    update(begin, 0, begin, end - begin, true);
    end = begin;
  }
  launch(clear_lower_kernel, grid_of(p.n, 65535), kThreads, 0, stream, p.H, p.n);
}

void inverse_factor_cuda(const InverseFactor& p, Stream s, int device) {
  const int64_t n = p.n;
  if (n == 0) return;
  const cuda::DeviceGuard guard(device);
  const cudaStream_t stream = cuda::raw(s);
  // U[from:from+rows, c:] += R[from:from+rows, c:c+k] U[c:c+k, c:]
  const auto accumulate = [&](int64_t from, int64_t rows, int64_t c, int64_t k) {
    const float *A = p.R + from * n + c, *B = p.U + c * n + c;
    gemm({rows, n - c, k, 1, A, n, 1, B, n, 1, p.U + from * n + c, n}, stream);
  };
  check_cuda(cudaMemsetAsync(p.U, 0, static_cast<size_t>(n) * n * sizeof(float), stream));
  launch(invert_diagonal_kernel, blocks(n), kThreads, 0, stream, p);
  for (int64_t end = n; end > 0;) {
    const int64_t begin = start_of(end, kSlice);
    for (int64_t last = end, c; last > begin; last = c) {
      c = start_of(last, kBlock);
      if (last < n) {
        launch(finish_rows_kernel, blocks(n - last), kThreads, 0, stream, p.U + c * n + c, n,
               static_cast<int>(last - c), n - last);
      }
      accumulate(begin, c - begin, c, last - c);
    }
    accumulate(0, begin, begin, end - begin);
    end = begin;
  }
}

void inverse_cuda(const Inverse& p, Stream s, int device) {
  const int64_t n = p.n;
  if (n == 0) return;
  const cuda::DeviceGuard guard(device);
  const cudaStream_t stream = cuda::raw(s);
  check_cuda(cudaMemsetAsync(p.out, 0, static_cast<size_t>(n) * n * sizeof(float), stream));
  for (int64_t c = 0; c < n; c += kSlice) {  // rows c.. of U reach only columns c.. of the product
    const float* U = p.U + c * n + c;
    const int64_t k = std::min(kSlice, n - c);
    gemm({n - c, n - c, k, 1, U, 1, n, U, n, 1, p.out + c * n + c, n, true}, stream);
  }
  const unsigned tiles = blocks(n);
  launch(mirror_kernel, dim3(tiles, std::min(tiles, 65535u)), kThreads, 0, stream, p.out, n);
}

}  // namespace distaya
