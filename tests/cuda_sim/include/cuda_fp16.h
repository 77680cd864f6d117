// Stand-in for CUDA's header: IEEE half precision as the kernels use it.
#pragma once

#include <cstdint>

#include "cuda_sim/api.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) { return cuda_sim::half_to_float(x.bits); }

inline __half __float2half_rn(float x) { return {cuda_sim::float_to_half(x)}; }

inline __half __float2half(float x) { return {cuda_sim::float_to_half(x)}; }

inline __half __ushort_as_half(unsigned short x) { return {x}; }

inline unsigned short __half_as_ushort(__half x) { return x.bits; }
