#include "core/cuda.cuh"
#include "hessian/hessian.h"

namespace distaya {
namespace {

using namespace cuda;

constexpr int kSide = 64;   // H tile per block: 64 x 64 by 256 threads, 4 x 4 elements each
constexpr int kSlice = 16;  // tokens in shared memory at once
constexpr int kPad = 4;     // keeps rows of a slice 16-byte aligned and off each other's banks
static_assert(kRun % kSlice == 0, "promotion happens between slices");

// Tile (blockIdx.y, blockIdx.x) of H += sum_t w_t x_t x_t^T; tiles below the diagonal leave at
// once. Each element is summed over t by one thread, promoted every kRun tokens: no order to vary.
template <class T>
__global__ void __launch_bounds__(256) syrk_kernel(const Hessian p) {
  const int64_t i0 = static_cast<int64_t>(blockIdx.y) * kSide,
                j0 = static_cast<int64_t>(blockIdx.x) * kSide;
  if (j0 < i0) return;
  __shared__ __align__(16) float left[kSlice][kSide + kPad];   // w_t x_ti
  __shared__ __align__(16) float right[kSlice][kSide + kPad];  // x_tj
  const T* X = static_cast<const T*>(p.X);
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float total[4][4] = {}, run[4][4] = {};
  for (int64_t t0 = 0; t0 < p.T; t0 += kSlice) {
    for (int k = threadIdx.x; k < kSlice * kSide; k += 256) {
      const int s = k / kSide, c = k % kSide;  // consecutive threads read consecutive columns
      const int64_t t = t0 + s;
      const float w = t >= p.T ? 0.f : p.weights ? p.weights[t] : 1.f;
      // A token of weight 0 may hold anything (padding), so it must not be multiplied but dropped.
      left[s][c] = w != 0 && i0 + c < p.C ? w * load_float(X + t * p.C + i0 + c) : 0.f;
      right[s][c] = w != 0 && j0 + c < p.C ? load_float(X + t * p.C + j0 + c) : 0.f;
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kSlice; ++s) {
      float a[4], b[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) a[q] = left[s][ty * 4 + q], b[q] = right[s][tx * 4 + q];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) run[i][j] = fmaf(a[i], b[j], run[i][j]);
    }
    __syncthreads();
    if ((t0 + kSlice) % kRun == 0 || t0 + kSlice >= p.T) {  // the same for every thread
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) total[i][j] += run[i][j], run[i][j] = 0.f;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = i0 + ty * 4 + i, col = j0 + tx * 4 + j;
      if (col < p.C && row <= col) p.H[row * p.C + col] += total[i][j];
    }
}

constexpr int kLanesX = 32;  // columns of a block: one per lane, so that a warp reads a line
constexpr int kRowsY = 8;    // warps of a block: each takes every eighth token

template <class T>
__global__ void __launch_bounds__(kLanesX* kRowsY) column_sq_kernel(const ColumnSq p) {
  __shared__ float part[kRowsY][kLanesX];
  const int x = threadIdx.x % kLanesX, y = threadIdx.x / kLanesX;
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kLanesX + x;
  const T* X = static_cast<const T*>(p.X);
  float total = 0.f;
  for (int64_t first = y; j < p.C && first < p.T; first += kRun * kRowsY) {
    float run = 0.f;
    const int64_t stop = first + kRun * kRowsY < p.T ? first + kRun * kRowsY : p.T;
    for (int64_t t = first; t < stop; t += kRowsY) {
      const float w = p.weights ? p.weights[t] : 1.f;
      if (w == 0) continue;
      const float value = load_float(X + t * p.C + j);
      run = fmaf(w * value, value, run);
    }
    total += run;
  }
  part[y][x] = total;
  __syncthreads();
  if (y != 0 || j >= p.C) return;
  float sum = part[0][x];
  for (int q = 1; q < kRowsY; ++q) sum += part[q][x];  // fixed order: same bits every run
  p.s[j] += sum;
}

constexpr int kFlip = 32;  // square transposed through shared memory by 32 x 8 threads

// Block (x >= y) copies its square of the upper triangle onto the mirrored one.
template <int kUnused = 0>
__global__ void __launch_bounds__(256) symmetrize_kernel(const Symmetrize p) {
  if (blockIdx.x < blockIdx.y) return;
  __shared__ float square[kFlip][kFlip + 1];
  const int64_t i0 = static_cast<int64_t>(blockIdx.y) * kFlip,
                j0 = static_cast<int64_t>(blockIdx.x) * kFlip;
  const int x = threadIdx.x % kFlip;
  for (int y = threadIdx.x / kFlip; y < kFlip; y += 8)
    if (i0 + y < p.C && j0 + x < p.C) square[y][x] = p.H[(i0 + y) * p.C + j0 + x];
  __syncthreads();
  for (int y = threadIdx.x / kFlip; y < kFlip; y += 8) {
    const int64_t row = j0 + y, col = i0 + x;
    if (row < p.C && col < row) p.H[row * p.C + col] = square[x][y];
  }
}

// Blocks along one side of H; a grid's y is limited to 65535.
unsigned side_of(int64_t C, int64_t side) {
  const int64_t blocks = ceil_div(C, side);
  check(blocks <= 65535, "H of ", C, " columns exceeds the CUDA grid (", 65535 * side, " columns)");
  return static_cast<unsigned>(blocks);
}

}  // namespace

void hessian_cuda(const Hessian& p, Stream stream) {
  const DeviceGuard guard(p.device);
  const unsigned side = side_of(p.C, kSide);
  dispatch<float, f16, bf16>(p.dtype, "X", [&]<class T>() {
    launch(syrk_kernel<T>, dim3(side, side), 256, 0, raw(stream), p);
  });
}

void column_sq_cuda(const ColumnSq& p, Stream stream) {
  const DeviceGuard guard(p.device);
  const int64_t blocks = ceil_div<int64_t>(p.C, kLanesX);
  check(blocks <= INT32_MAX, "X of ", p.C, " columns exceeds the CUDA grid");
  dispatch<float, f16, bf16>(p.dtype, "X", [&]<class T>() {
    launch(column_sq_kernel<T>, static_cast<unsigned>(blocks), kLanesX * kRowsY, 0, raw(stream), p);
  });
}

void symmetrize_cuda(const Symmetrize& p, Stream stream) {
  const DeviceGuard guard(p.device);
  const unsigned side = side_of(p.C, kFlip);
  launch(symmetrize_kernel<>, dim3(side, side), 256, 0, raw(stream), p);
}

}  // namespace distaya
