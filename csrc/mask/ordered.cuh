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

}  // namespace distaya::mask
