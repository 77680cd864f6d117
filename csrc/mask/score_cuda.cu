#include "core/cuda.cuh"
#include "mask/mask.h"

namespace distaya::mask {
namespace {

using cuda::ceil_div;
using cuda::grid_of;
using cuda::launch;
using cuda::load_float;

constexpr int kThreads = 256;
constexpr int64_t kMostY = 65535;  // grid limit in y: rows beyond it are strided over

// |W| or |W| * norm: one thread per column of a row.
template <class T>
__global__ void __launch_bounds__(kThreads) plain_kernel(const Score p) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= p.cols) return;
  const float norm = p.norms ? p.norms[j] : 1.f;
  for (int64_t i = blockIdx.y; i < p.rows; i += gridDim.y)
    p.S[i * p.cols + j] = fabsf(load_float(static_cast<const T*>(p.W) + i * p.cols + j)) * norm;
}

__device__ inline double inverse(double sum) { return sum == 0 ? 0 : 1 / sum; }

// One block per row; thread t adds columns t, t + 256, ... and the tree below is fixed.
template <class T>
__global__ void __launch_bounds__(kThreads) row_sums_kernel(const Score p) {
  __shared__ double part[kThreads / 32];
  for (int64_t i = blockIdx.x; i < p.rows; i += gridDim.x) {
    const T* W = static_cast<const T*>(p.W) + i * p.cols;
    double sum = 0;
    for (int64_t j = threadIdx.x; j < p.cols; j += kThreads) sum += fabsf(load_float(W + j));
    sum = cuda::warp_sum(sum);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kThreads / 32; ++w) sum += part[w];
      p.work[i] = inverse(sum);
    }
    __syncthreads();  // part is written again for the next row
  }
}

// blockIdx.y is a band of rows; each thread walks one column down its band (coalesced over j).
template <class T>
__global__ void __launch_bounds__(kThreads) band_sums_kernel(const Score p) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= p.cols) return;
  const int64_t height = ceil_div<int64_t>(p.rows, kBands), first = blockIdx.y * height;
  const int64_t last = first + height < p.rows ? first + height : p.rows;
  double sum = 0;
  for (int64_t i = first; i < last; ++i)
    sum += fabsf(load_float(static_cast<const T*>(p.W) + i * p.cols + j));
  p.work[p.rows + (2 + static_cast<int64_t>(blockIdx.y)) * p.cols + j] = sum;
}

__global__ void __launch_bounds__(kThreads) columns_kernel(const Score p) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= p.cols) return;
  double* column = p.work + p.rows + j;
  double sum = 0;
  for (int64_t band = 0; band < kBands; ++band) sum += column[(2 + band) * p.cols];
  column[0] = inverse(sum);
  column[p.cols] = pow(static_cast<double>(p.norms[j]), p.power);
}

template <class T>
__global__ void __launch_bounds__(kThreads) ria_kernel(const Score p) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= p.cols) return;
  const double column = p.work[p.rows + j], power = p.work[p.rows + p.cols + j];
  for (int64_t i = blockIdx.y; i < p.rows; i += gridDim.y) {
    const double a = fabsf(load_float(static_cast<const T*>(p.W) + i * p.cols + j));
    p.S[i * p.cols + j] = static_cast<float>(a * (column + p.work[i]) * power);
  }
}

}  // namespace

void score_cuda(const Score& p, int device, Stream stream) {
  const cuda::DeviceGuard guard(device);
  const cudaStream_t s = cuda::raw(stream);
  const unsigned across = grid_of(ceil_div<int64_t>(p.cols, kThreads));
  const dim3 grid(across, grid_of(p.rows, kMostY));
  dispatch<float, f16, bf16>(p.dtype, "W", [&]<class T>() {
    if (!p.work) {
      launch(plain_kernel<T>, grid, kThreads, 0, s, p);
    } else {
      launch(row_sums_kernel<T>, grid_of(p.rows), kThreads, 0, s, p);
      launch(band_sums_kernel<T>, dim3(across, kBands), kThreads, 0, s, p);
      launch(columns_kernel, across, kThreads, 0, s, p);
      launch(ria_kernel<T>, grid, kThreads, 0, s, p);
    }
  });
}

}  // namespace distaya::mask
