// Stand-in for CUDA's header: bfloat16 as the kernels use it.
#pragma once

#include <cstdint>

#include "cuda_sim/api.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return cuda_sim::bf16_to_float(x.bits); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {cuda_sim::float_to_bf16(x)}; }

inline __nv_bfloat16 __float2bfloat16(float x) { return {cuda_sim::float_to_bf16(x)}; }

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return {x}; }

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
