// What the CUDA kernels of this room share: a tile's groups, the chunks of a mask, reports.
#pragma once

#include "core/cuda.cuh"
#include "pack/pack.h"

namespace distaya::pack {

inline constexpr int kThreads = 256;

// Columns of a tile that share a grid, and the number of such groups.
__device__ inline int width_of(const Format& f) {
  return f.group ? static_cast<int>(f.group) : kTileCols;
}

__device__ inline int groups_of(const Format& f) { return kTileCols / width_of(f); }

// *bad starts as -1, the largest unsigned; the minimum does not depend on who comes first.
__device__ inline void report(int64_t* bad, int64_t index) {
  atomicMin(reinterpret_cast<unsigned long long*>(bad), static_cast<unsigned long long>(index));
}

__device__ inline int bytes_of(uint64_t mask) { return (__popcll(mask) + 1) / 2; }

// One warp: where the codes of each chunk begin, in bytes after the mask. Returns their sum.
__device__ inline int scan_chunks(const uint64_t* masks, int* starts, int lane) {
  int sizes[4], sum = 0;
  for (int i = 0; i < 4; ++i) sum += sizes[i] = bytes_of(masks[4 * lane + i]);
  int upto = sum;
  for (int d = 1; d < 32; d *= 2) {
    const int below = __shfl_up_sync(cuda::kFullWarp, upto, d);
    if (lane >= d) upto += below;
  }
  int at = upto - sum;
  for (int i = 0; i < 4; ++i) {
    starts[4 * lane + i] = at;
    at += sizes[i];
  }
  return __shfl_sync(cuda::kFullWarp, upto, 31);
}

// Where the scales and zeros of a tile lie: in its record, or in the row section.
struct Grid {
  const uint8_t* scales;
  const uint8_t* zeros;
};

__device__ inline Grid row_grid_at(const Format& f, const uint8_t* section, int64_t rt) {
  const int64_t all = f.row_tiles() * kTileRows, first = rt * kTileRows;
  return {section + first * f.scale_bytes(), section + all * f.scale_bytes() + first};
}

__device__ inline Grid grid_at(const Format& f, const uint8_t* data, int64_t rt, int64_t ct) {
  if (!f.group) return row_grid_at(f, data + row_section_at(f, data), rt);
  const uint8_t* record = data + record_at(f, data, rt, ct);
  return {record, record + f.zeros_at()};
}

__device__ inline float scale_at(const Format& f, const uint8_t* scales, int i) {
  switch (f.scale) {
    case Dtype::f32: return reinterpret_cast<const float*>(scales)[i];
    case Dtype::bf16: return cuda::load_float(reinterpret_cast<const bf16*>(scales) + i);
    default: return cuda::load_float(reinterpret_cast<const f16*>(scales) + i);
  }
}

__device__ inline uint32_t zero_at(const Format& f, const uint8_t* zeros, int i) {
  return f.symmetric ? static_cast<uint32_t>(f.symmetric_zero()) : zeros[i];
}

}  // namespace distaya::pack
