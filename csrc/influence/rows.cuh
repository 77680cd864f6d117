// Sums over a thread block that has one row, and hidden states compared by them.
#pragma once

#include "core/cuda.cuh"
#include "influence/influence.h"

namespace distaya::influence {

inline constexpr int kThreads = 256;

// Sums over the block for every thread: a tree over lanes, then the warps in their order. `part` is
// shared memory, free again when this returns.
template <int count>
__device__ void block_sums(double (&x)[count], double (&part)[count][kThreads / 32]) {
#pragma unroll
  for (int c = 0; c < count; ++c) {
    x[c] = cuda::warp_sum(x[c]);
    if (threadIdx.x % 32 == 0) part[c][threadIdx.x / 32] = x[c];
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < count; ++c) {
    x[c] = 0;
    for (int w = 0; w < kThreads / 32; ++w) x[c] += part[c][w];
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kThreads) similarity_kernel(const Similarity p) {
  __shared__ double sizes[3][kThreads / 32], angles[2][kThreads / 32];
  for (int64_t t = blockIdx.x; t < p.tokens; t += gridDim.x) {
    const T* x = static_cast<const T*>(p.X) + t * p.hidden;
    const T* y = static_cast<const T*>(p.Y) + t * p.hidden;
    double size[3] = {};  // |x|^2, |y|^2, |y - x|^2
#pragma unroll 4
    for (int64_t j = threadIdx.x; j < p.hidden; j += kThreads) {
      const double a = cuda::load_float(x + j), b = cuda::load_float(y + j), d = b - a;
      size[0] += a * a, size[1] += b * b, size[2] += d * d;
    }
    block_sums(size, sizes);
    const double unit_x = 1 / sqrt(size[0]), unit_y = 1 / sqrt(size[1]);
    double angle[2] = {};
#pragma unroll 4
    for (int64_t j = threadIdx.x; j < p.hidden; j += kThreads) {
      const double a = cuda::load_float(x + j) * unit_x, b = cuda::load_float(y + j) * unit_y;
      const double minus = a - b, plus = a + b;
      angle[0] += minus * minus, angle[1] += plus * plus;
    }
    block_sums(angle, angles);
    if (threadIdx.x == 0) compare(size[0], size[1], size[2], angle[0], angle[1], p.out + 3 * t);
  }
}

}  // namespace distaya::influence
