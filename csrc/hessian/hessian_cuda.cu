#include <atomic>

#include "core/cuda.cuh"
#include "hessian/hessian.h"
#include "hessian/syrk.cuh"

namespace distaya {
namespace {

using namespace cuda;

// The upper triangle of n x n squares as a grid without idle blocks: for even n, n / 2 rows of
// n + 1; row y holds row y of the triangle and, before it, row n - 1 - y turned around. For odd n
// one square more on each side is imagined; callers find it outside.
struct Square {
  int64_t row, column;
};

dim3 triangle(int64_t C, int64_t side) {
  const int64_t n = ceil_div(C, side), even = n + n % 2;
  check(even / 2 <= 65535, "H of ", C, " columns exceeds the CUDA grid (", 131070 * side,
        " columns)");
  return dim3(static_cast<unsigned>(even + 1), static_cast<unsigned>(even / 2));
}

__device__ Square square_of_block() {
  const int64_t n = gridDim.x - 1, x = blockIdx.x, y = blockIdx.y;
  if (x > y) return {y, x - 1};
  return {n - 1 - y, n - 1 - x};
}

constexpr int kSide = 64;   // H tile per block: 64 x 64 by 256 threads, 4 x 4 elements each
constexpr int kDepth = 16;  // tokens in shared memory at once
constexpr int kPad = 4;     // keeps rows of a slice 16-byte aligned and off each other's banks
static_assert(kRun % kDepth == 0, "promotion happens between slices");

// One tile of H += sum_t w_t x_t x_t^T (cross: of G, with y_t to the left) for float32 X, on the
// ordinary units. Each element is summed over t by one thread, promoted every kRun tokens: no order
// to vary.
template <class T, bool cross>
__global__ void __launch_bounds__(256, 3) plain_syrk_kernel(const Hessian p) {
  const Square square = cross ? Square{blockIdx.y, blockIdx.x} : square_of_block();
  const int64_t i0 = square.row * kSide, j0 = square.column * kSide;
  if (j0 >= p.C) return;
  // Both times the root of w_t; a negative weight, which nothing here refuses, gives `right` a
  // sign.
  __shared__ __align__(16) float left[kDepth][kSide + kPad];
  __shared__ __align__(16) float right[kDepth][kSide + kPad];
  const T* X = static_cast<const T*>(p.X);
  const T* Y = cross ? static_cast<const T*>(p.Y) : X;
  const int64_t rows = cross ? p.K : p.C;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float total[4][4] = {}, run[4][4] = {};
  for (int64_t t0 = 0; t0 < p.T; t0 += kDepth) {
    for (int k = threadIdx.x; k < kDepth * kSide; k += 256) {
      const int s = k / kSide, c = k % kSide;  // consecutive threads read consecutive columns
      const int64_t t = t0 + s;
      const float w = t >= p.T ? 0.f : p.weights ? p.weights[t] : 1.f;
      // A token of weight 0 may hold anything (padding), so it must not be multiplied but dropped.
      const float root = sqrtf(fabsf(w)), other = copysignf(root, w);
      left[s][c] = w != 0 && i0 + c < rows ? root * load_float(Y + t * rows + i0 + c) : 0.f;
      right[s][c] = w != 0 && j0 + c < p.C ? other * load_float(X + t * p.C + j0 + c) : 0.f;
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kDepth; ++s) {
      float a[4], b[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) a[q] = left[s][ty * 4 + q], b[q] = right[s][tx * 4 + q];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) run[i][j] = fmaf(a[i], b[j], run[i][j]);
    }
    __syncthreads();
    if ((t0 + kDepth) % kRun == 0 || t0 + kDepth >= p.T) {  // the same for every thread
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
      if (col < p.C && (cross ? row < rows : row <= col)) p.H[row * p.C + col] += total[i][j];
    }
}

constexpr int kLanesX = 4;    // threads along a token: 16 bytes each, so 64 bytes in one piece
constexpr int kTokensY = 64;  // threads along the tokens: each takes every 64th
constexpr int kAhead = 4;     // tokens of a thread under way at once

// kWide elements from x on, of which n exist; aligned: all of them, at a multiple of 16 bytes.
template <class T, bool aligned, int kWide>
__device__ void load_elements(float (&out)[kWide], const T* x, int64_t n) {
  if constexpr (aligned) {
    const uint4 words = *reinterpret_cast<const uint4*>(x);
    const auto* value = reinterpret_cast<const T*>(&words);
#pragma unroll
    for (int i = 0; i < kWide; ++i) out[i] = load_float(value + i);
  } else {
#pragma unroll
    for (int i = 0; i < kWide; ++i) out[i] = i < n ? load_float(x + i) : 0.f;
  }
}

// Adds w x^2 of kAhead tokens, kTokensY apart, to run; all are on their way before the first is
// used.
template <class T, bool aligned, int kWide>
__device__ void add_squares(const ColumnSq& p, int64_t t, int64_t j, float (&run)[kWide]) {
  float w[kAhead], x[kAhead][kWide] = {};
#pragma unroll
  for (int k = 0; k < kAhead; ++k) {
    const int64_t token = t + k * kTokensY;
    w[k] = token >= p.T ? 0.f : p.weights ? p.weights[token] : 1.f;
  }
#pragma unroll
  for (int k = 0; k < kAhead; ++k)
    if (w[k] != 0)
      load_elements<T, aligned>(x[k], static_cast<const T*>(p.X) + (t + k * kTokensY) * p.C + j,
                                p.C - j);
#pragma unroll
  for (int k = 0; k < kAhead; ++k)
#pragma unroll
    for (int i = 0; i < kWide; ++i) run[i] = fmaf(w[k] * x[k][i], x[k][i], run[i]);
}

// 64 bytes of columns a block. Counted: 16 KB under way in each of 448 blocks for 14336 columns of
// bf16, 128 for 4096; both are the 2 MB that the memory of an H100 needs to be busy. aligned: every
// row of X begins at a multiple of 16 bytes.
template <class T, bool aligned>
__global__ void __launch_bounds__(kLanesX* kTokensY, 2) column_sq_kernel(const ColumnSq p) {
  constexpr int kWide = 16 / sizeof(T), kColumns = kLanesX * kWide;
  __shared__ float part[kTokensY][kColumns + 1];
  const int x = threadIdx.x % kLanesX, y = threadIdx.x / kLanesX;
  const int64_t j = (static_cast<int64_t>(blockIdx.x) * kLanesX + x) * kWide;
  float total[kWide] = {};
  for (int64_t first = y; j < p.C && first < p.T; first += kRun * kTokensY) {
    float run[kWide] = {};
    const int64_t stop = first + kRun * kTokensY < p.T ? first + kRun * kTokensY : p.T;
    for (int64_t t = first; t < stop; t += kAhead * kTokensY) add_squares<T, aligned>(p, t, j, run);
#pragma unroll
    for (int i = 0; i < kWide; ++i) total[i] += run[i];
  }
#pragma unroll
  for (int i = 0; i < kWide; ++i) part[y][x * kWide + i] = total[i];
  __syncthreads();
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  if (threadIdx.x >= kColumns || column >= p.C) return;
  float sum = part[0][threadIdx.x];
  for (int q = 1; q < kTokensY; ++q) sum += part[q][threadIdx.x];  // fixed order: the same bits
  p.s[column] += sum;
}

constexpr int kFlip = 32;  // square transposed through shared memory by 32 x 8 threads

// Each block copies a square of the upper triangle onto the mirrored one.
template <int kUnused = 0>
__global__ void __launch_bounds__(256) symmetrize_kernel(const Symmetrize p) {
  __shared__ float square[kFlip][kFlip + 1];
  const Square at = square_of_block();
  const int64_t i0 = at.row * kFlip, j0 = at.column * kFlip;
  const int x = threadIdx.x % kFlip;
  for (int y = threadIdx.x / kFlip; y < kFlip; y += 8)
    if (i0 + y < p.C && j0 + x < p.C) square[y][x] = p.H[(i0 + y) * p.C + j0 + x];
  __syncthreads();
  for (int y = threadIdx.x / kFlip; y < kFlip; y += 8) {
    const int64_t row = j0 + y, col = i0 + x;
    if (row < p.C && col < row) p.H[row * p.C + col] = square[x][y];
  }
}

bool aligned_rows(const void* X, int64_t C, Dtype dtype) {
  const int64_t bytes = C * (dtype == Dtype::f32 ? 4 : 2);
  return reinterpret_cast<uintptr_t>(X) % 16 == 0 && bytes % 16 == 0;
}

template <class T, bool aligned, bool cross>
void tensor_syrk(const Hessian& p, cudaStream_t stream) {
  const auto kernel = syrk::syrk_kernel<T, aligned, cross>;
  static std::atomic<uint64_t> allowed{0};  // a bit per device: asking costs more than a launch
  const uint64_t bit = p.device < 64 ? uint64_t{1} << p.device : 0;
  if (!(allowed.load() & bit)) {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    syrk::kSharedBytes));
    allowed.fetch_or(bit);
  }
  const int64_t rows = ceil_div<int64_t>(p.K, syrk::kPanel);
  const int64_t panels = ceil_div<int64_t>(p.C, syrk::kPanel);
  const int64_t tiles = cross ? syrk::cross_tiles(rows, panels) : syrk::tiles(panels);
  constexpr int64_t kWidest = 1 << 29;  // columns: the kernel counts a token's bytes in 32 bits
  check(tiles <= INT32_MAX && p.K < kWidest && p.C < kWidest, cross ? "G" : "H", " of ", p.K, "x",
        p.C, " exceeds the CUDA grid");
  constexpr int64_t kMost = 1 << 30;  // tokens: the kernel counts them in 32 bits
  for (int64_t t = 0; t < p.T; t += kMost) {
    Hessian part = p;
    part.T = p.T - t < kMost ? p.T - t : kMost;
    part.X = static_cast<const T*>(p.X) + t * p.C;
    if (cross) part.Y = static_cast<const T*>(p.Y) + t * p.K;
    if (p.weights) part.weights = p.weights + t;
    launch(kernel, static_cast<unsigned>(tiles), syrk::kThreads, syrk::kSharedBytes, stream, part);
  }
}

template <bool cross>
void start(const Hessian& p, cudaStream_t stream) {
  if (p.dtype == Dtype::f32) {
    const int64_t rows = ceil_div<int64_t>(p.K, kSide), columns = ceil_div<int64_t>(p.C, kSide);
    check(!cross || (rows <= 65535 && columns <= INT32_MAX), "G of ", p.K, "x", p.C,
          " exceeds the CUDA grid (", 65535 * kSide, " rows)");
    const dim3 all(static_cast<unsigned>(columns), static_cast<unsigned>(rows));
    return launch(plain_syrk_kernel<float, cross>, cross ? all : triangle(p.C, kSide), 256, 0,
                  stream, p);
  }
  dispatch<f16, bf16>(p.dtype, "X", [&]<class T>() {
    if (aligned_rows(p.X, p.C, p.dtype) && (!cross || aligned_rows(p.Y, p.K, p.dtype)))
      tensor_syrk<T, true, cross>(p, stream);
    else
      tensor_syrk<T, false, cross>(p, stream);
  });
}

}  // namespace

void hessian_cuda(const Hessian& p, Stream stream) {
  const DeviceGuard guard(p.device);
  if (p.Y) return start<true>(p, raw(stream));
  start<false>(p, raw(stream));
}

void column_sq_cuda(const ColumnSq& p, Stream stream) {
  const DeviceGuard guard(p.device);
  dispatch<float, f16, bf16>(p.dtype, "X", [&]<class T>() {
    const int64_t blocks = ceil_div<int64_t>(p.C, kLanesX * 16 / sizeof(T));
    check(blocks <= INT32_MAX, "X of ", p.C, " columns exceeds the CUDA grid");
    const auto kernel =
        aligned_rows(p.X, p.C, p.dtype) ? column_sq_kernel<T, true> : column_sq_kernel<T, false>;
    launch(kernel, static_cast<unsigned>(blocks), kLanesX * kTokensY, 0, raw(stream), p);
  });
}

void symmetrize_cuda(const Symmetrize& p, Stream stream) {
  const DeviceGuard guard(p.device);
  launch(symmetrize_kernel<>, triangle(p.C, kFlip), 256, 0, raw(stream), p);
}

}  // namespace distaya
