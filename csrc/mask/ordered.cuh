// Device twins of ordered.h: scores as unsigned integers that sort like the scores.
#pragma once

#include "core/cuda.cuh"

namespace distaya::mask {

// sign * magnitude + 2^31: -0 and +0 meet in the middle.
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x), size = bits & 0x7fffffffu;
  return 0x80000000u + (bits >> 31 ? 0u - size : size);
}

__device__ inline bool is_nan(float x) { return (__float_as_uint(x) & 0x7fffffffu) > 0x7f800000u; }

// *bad starts as -1, the largest unsigned; the minimum does not depend on who comes first.
__device__ inline void report_nan(int64_t* bad, int64_t index) {
  atomicMin(reinterpret_cast<unsigned long long*>(bad), static_cast<unsigned long long>(index));
}

// Inclusive sum over the block of one number per thread; `part` is [warps] of shared memory, free
// again when this returns.
template <class T>
__device__ inline T block_scan(T x, T* part) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int d = 1; d < 32; d *= 2) {
    const T below = __shfl_up_sync(cuda::kFullWarp, x, d);
    if (lane >= d) x += below;
  }
  if (lane == 31) part[warp] = x;
  __syncthreads();
  for (int w = 0; w < warp; ++w) x += part[w];
  __syncthreads();
  return x;
}

}  // namespace distaya::mask
