// N_b as the device keeps it, and the loop that multiplies with it: a thread owns a row and 16
// columns (a tile) in registers, the factor is the same for all threads of a warp.
#pragma once

#include "core/cuda.cuh"
#include "obs/obs.h"

namespace distaya {

inline constexpr int kB = static_cast<int>(kObsBlock);
inline constexpr int kTileColumns = 16;
inline constexpr int kTiles = kB / kTileColumns;

// N_b is upper triangular, so tile t keeps rows 0 .. 16 t + 15 only: [tile][row][16], 36 KB a
// block instead of 64. Columns beyond a narrower block are zeros.
DISTAYA_HD constexpr int tile_offset(int tile) {
  return kTileColumns * kTileColumns / 2 * tile * (tile + 1);
}

inline constexpr int kPacked = tile_offset(kTiles);  // floats of one N_b

// x += sign factor[k] N[k], k = from .. to - 1 in that order. factor: this thread's column of a
// [k][pitch] array in shared memory; N: rows of a tile, in shared memory. Per k, 16 FMA slots go
// with 5 loads of one wavefront each (the row of N is a broadcast), so the FMA pipe is the bound.
template <int sign>
__device__ inline void accumulate(float (&x)[kTileColumns], const float* factor, int pitch,
                                  const float* N, int from, int to) {
#pragma unroll 2
  for (int k = from; k < to; ++k) {
    const float f = sign * factor[k * pitch];
    const auto* row = reinterpret_cast<const float4*>(N + k * kTileColumns);
#pragma unroll
    for (int v = 0; v < kTileColumns / 4; ++v) {
      const float4 n = row[v];
      x[4 * v] = fmaf(f, n.x, x[4 * v]);
      x[4 * v + 1] = fmaf(f, n.y, x[4 * v + 1]);
      x[4 * v + 2] = fmaf(f, n.z, x[4 * v + 2]);
      x[4 * v + 3] = fmaf(f, n.w, x[4 * v + 3]);
    }
  }
}

// One N_b from global to shared memory, by the whole block; a barrier must follow.
__device__ inline void load_packed(const float* N, float* to) {
  for (int i = threadIdx.x; i < kPacked / 4; i += blockDim.x)
    reinterpret_cast<float4*>(to)[i] = reinterpret_cast<const float4*>(N)[i];
}

}  // namespace distaya
