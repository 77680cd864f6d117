// Quantisation grids on the device (obs.h, Grid): the rules, and rounding to nearest by whole
// warps. The sweep fits its grids a row per thread (obs_sweep.cuh).
#pragma once

#include "core/cuda.cuh"
#include "obs/obs.h"

namespace distaya {

struct Fitted {
  float scale, zero;
};

__device__ inline float top_code(const Grid& grid) {
  return static_cast<float>((1 << grid.bits) - 1);
}

__device__ inline float code_of(float w, const Fitted& fit, float top) {
  return fminf(fmaxf(rintf(w / fit.scale) + fit.zero, 0.f), top);
}

// Rounds a scale to the type it is stored in, never to zero and never to infinity in f16.
__device__ inline float stored_scale(float scale, Dtype dtype) {
  if (dtype == Dtype::f16)
    return fmaxf(__half2float(__float2half_rn(fminf(scale, 65504.f))), 0x1p-24f);
  if (dtype == Dtype::bf16) scale = __bfloat162float(__float2bfloat16_rn(scale));
  return fmaxf(scale, 0x1p-126f);
}

__device__ inline Fitted grid_from_range(const Grid& grid, float low, float high) {
  const float top = top_code(grid);
  Fitted fit;
  fit.scale = stored_scale((high - low) / top, grid.scale_dtype);
  fit.zero = grid.symmetric ? static_cast<float>(1 << (grid.bits - 1))
                            : fminf(fmaxf(rintf(-low / fit.scale), 0.f), top);
  return fit;
}

// Range rules of obs.h from the least and the greatest value, 0 included.
__device__ inline void settle_range(const Grid& grid, float& low, float& high) {
  if (grid.symmetric) {
    high = fmaxf(-low, high);
    low = low < 0.f ? -high : 0.f;
  }
  if (low == 0.f && high == 0.f) low = -1.f, high = 1.f;
}

// The grid of a range; with mse, of 80 shrunken ranges the first with the least error_of(fit).
template <class Error>
__device__ Fitted fit_range(const Grid& grid, float low, float high, const Error& error_of) {
  settle_range(grid, low, high);
  Fitted best = grid_from_range(grid, low, high);
  if (!grid.mse) return best;
  float least = error_of(best);
#pragma unroll 1
  for (int i = 1; i < 80; ++i) {
    const float shrink = static_cast<float>(100 - i) / 100.f;
    // Rounded before they are subtracted from each other, as on the CPU: no fused multiply-add.
    const Fitted fit = grid_from_range(grid, __fmul_rn(shrink, low), __fmul_rn(shrink, high));
    const float error = error_of(fit);
    if (error < least) least = error, best = fit;
  }
  return best;
}

// |q - w|^2.4 as d^2 2^(0.4 log2 d): a fraction of powf's instructions. Relative error below 1e-6:
// log2's 1 ulp times 0.4, at most 2^-19 where |log2 d| < 32.
__device__ inline float rounding_error(float w, const Fitted& fit, float top) {
  const float d = fabsf(fit.scale * (code_of(w, fit, top) - fit.zero) - w);
  return d * d * exp2f(0.4f * log2f(fmaxf(d, 1e-15f)));
}

__device__ inline float warp_max(float x) {
  for (int d = 16; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(cuda::kFullWarp, x, d));
  return x;
}

constexpr int kQuantizeWarps = 8;

// Round to nearest: one warp per (row, group), any group width.
template <class T>
__global__ void __launch_bounds__(kQuantizeWarps * 32) quantize_kernel(const Quantize p) {
  const int lane = threadIdx.x % 32;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kQuantizeWarps + threadIdx.x / 32;
  if (item >= p.rows * p.groups) return;
  const int64_t row = item / p.groups, first = item % p.groups * p.group;
  const int64_t last = first + p.group < p.cols ? first + p.group : p.cols;
  T* W = static_cast<T*>(p.W) + row * p.cols;
  const float top = top_code(p.grid);
  float low = 0.f, high = 0.f;
  for (int64_t j = first + lane; j < last; j += 32) {
    const float w = cuda::load_float(W + j);
    low = fminf(low, w);
    high = fmaxf(high, w);
  }
  low = -warp_max(-low);
  high = warp_max(high);
  const Fitted fit = fit_range(p.grid, low, high, [&](const Fitted& candidate) {
    float sum = 0.f;
#pragma unroll 1  // more would spill on sm_120
    for (int64_t j = first + lane; j < last; j += 32)
      sum += rounding_error(cuda::load_float(W + j), candidate, top);
    return cuda::warp_sum(sum);
  });
  if (lane == 0) {
    p.scales[item] = fit.scale;
    p.zeros[item] = fit.zero;
  }
  if (!p.codes) return;
  for (int64_t j = first + lane; j < last; j += 32) {
    const float code = code_of(cuda::load_float(W + j), fit, top);
    p.codes[row * p.cols + j] = static_cast<uint8_t>(code);
    cuda::store_float(W + j, fit.scale * (code - fit.zero));
  }
}

}  // namespace distaya
