// Quantisation grids on the device, by whole warps: a group's range is a warp reduction.
#pragma once

#include "core/cuda.cuh"
#include "obs/obs.h"

namespace distaya {

struct Fitted {
  float scale, zero;
};

__device__ inline float code_of(float w, float scale, float zero, int bits) {
  const float top = static_cast<float>((1 << bits) - 1);
  return fminf(fmaxf(rintf(w / scale) + zero, 0.f), top);
}

// Rounds a scale to the type it is stored in, never to zero.
__device__ inline float stored_scale(float scale, Dtype dtype) {
  if (dtype == Dtype::bf16) {
    const float tiny = __uint_as_float(0x00010000u);  // smallest positive bfloat16
    return fmaxf(__bfloat162float(__float2bfloat16_rn(scale)), tiny);
  }
  if (dtype == Dtype::f16) return fmaxf(__half2float(__float2half_rn(scale)), 0x1p-24f);
  return fmaxf(scale, __uint_as_float(1u));
}

__device__ inline Fitted grid_from_range(const Grid& grid, float low, float high) {
  const float top = static_cast<float>((1 << grid.bits) - 1);
  Fitted fit;
  fit.scale = stored_scale((high - low) / top, grid.scale_dtype);
  fit.zero = grid.symmetric ? static_cast<float>(1 << (grid.bits - 1))
                            : fminf(fmaxf(rintf(-low / fit.scale), 0.f), top);
  return fit;
}

__device__ inline float warp_max(float x) {
  for (int d = 16; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(cuda::kFullWarp, x, d));
  return x;
}

// Range rules of obs.h from a warp's own least and greatest value (0 included).
__device__ inline void settle_range(const Grid& grid, float& low, float& high) {
  low = -warp_max(-fminf(low, 0.f));
  high = warp_max(fmaxf(high, 0.f));
  if (grid.symmetric) {
    high = fmaxf(-low, high);
    low = low < 0.f ? -high : 0.f;
  }
  if (low == 0.f && high == 0.f) low = -1.f, high = 1.f;
}

// |q - w|^2.4 summed by the caller over the lane's values: the MSE search keeps the first best
// shrink. error_of(fit) returns the lane's partial sum.
template <class Error>
__device__ Fitted search_grid(const Grid& grid, float low, float high, const Error& error_of) {
  Fitted best = grid_from_range(grid, low, high);
  if (!grid.mse) return best;
  float least = cuda::warp_sum(error_of(best));
  for (int i = 1; i < 80; ++i) {
    const float shrink = 1.f - static_cast<float>(i) / 100.f;
    const Fitted fit = grid_from_range(grid, shrink * low, shrink * high);
    const float error = cuda::warp_sum(error_of(fit));
    if (error < least) least = error, best = fit;
  }
  return best;
}

__device__ inline float rounding_error(float w, const Fitted& fit, int bits) {
  const float q = fit.scale * (code_of(w, fit.scale, fit.zero, bits) - fit.zero);
  return powf(fabsf(q - w), 2.4f);
}

// Grid of the columns [first, last) of a row block of 128 that a warp holds as t[slot] = column
// slot * 32 + lane.
__device__ inline Fitted fit_grid(const Grid& grid, const float (&t)[4], int first, int last) {
  const int lane = threadIdx.x % 32;
  float low = 0.f, high = 0.f;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int j = c * 32 + lane;
    if (j >= first && j < last) low = fminf(low, t[c]), high = fmaxf(high, t[c]);
  }
  settle_range(grid, low, high);
  return search_grid(grid, low, high, [&](const Fitted& fit) {
    float sum = 0.f;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int j = c * 32 + lane;
      if (j >= first && j < last) sum += rounding_error(t[c], fit, grid.bits);
    }
    return sum;
  });
}

// Round to nearest: one warp per (row, group), any group width.
template <class T>
__global__ void quantize_kernel(const Quantize p) {
  const int lane = threadIdx.x % 32;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (item >= p.rows * p.groups) return;
  const int64_t row = item / p.groups, first = item % p.groups * p.group;
  const int64_t last = first + p.group < p.cols ? first + p.group : p.cols;
  T* W = static_cast<T*>(p.W) + row * p.cols;
  float low = 0.f, high = 0.f;
  for (int64_t j = first + lane; j < last; j += 32) {
    const float w = cuda::load_float(W + j);
    low = fminf(low, w);
    high = fmaxf(high, w);
  }
  settle_range(p.grid, low, high);
  const Fitted fit = search_grid(p.grid, low, high, [&](const Fitted& candidate) {
    float sum = 0.f;
    for (int64_t j = first + lane; j < last; j += 32)
      sum += rounding_error(cuda::load_float(W + j), candidate, p.grid.bits);
    return sum;
  });
  if (lane == 0) {
    p.scales[item] = fit.scale;
    p.zeros[item] = fit.zero;
  }
  if (!p.codes) return;
  for (int64_t j = first + lane; j < last; j += 32) {
    const float code = code_of(cuda::load_float(W + j), fit.scale, fit.zero, p.grid.bits);
    p.codes[row * p.cols + j] = static_cast<uint8_t>(code);
    cuda::store_float(W + j, fit.scale * (code - fit.zero));
  }
}

}  // namespace distaya
