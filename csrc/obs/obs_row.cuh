// One thread's row of a block of the sweep: 128 columns in shared memory, 16 of them in registers
// while they are worked on; which N:M weights go, and the grid of a group, by that thread alone.
#pragma once

#include "obs/obs_grid.cuh"
#include "obs/obs_tiles.cuh"

namespace distaya {

// One thread's row of the block.
struct Row {
  float* t;  // its weights: column j at t[j * pitch]
  int pitch;
  uint64_t gone0, gone1;  // columns that are pruned
  uint64_t done;          // updates applied to each tile, a byte each; the same in the whole warp

  __device__ unsigned gone_of(int tile) const {
    return static_cast<unsigned>((tile < 4 ? gone0 : gone1) >> tile % 4 * 16) & 0xffffu;
  }

  __device__ void prune(int j, unsigned bits) {  // bit l: column j + l
    if (j < 64) gone0 |= static_cast<uint64_t>(bits) << j;
    if (j >= 64) gone1 |= static_cast<uint64_t>(bits) << (j - 64);
    if (j < 64 && j > 32) gone1 |= static_cast<uint64_t>(bits) >> (64 - j);
  }
};

__device__ inline void get_tile(const Row& row, int tile, float (&x)[kTileColumns]) {
#pragma unroll
  for (int c = 0; c < kTileColumns; ++c) x[c] = row.t[(tile * kTileColumns + c) * row.pitch];
}

// Columns `from` .. 15 of the tile.
__device__ inline void put_tile(const Row& row, int tile, int from,
                                const float (&x)[kTileColumns]) {
#pragma unroll
  for (int c = 0; c < kTileColumns; ++c)
    if (c >= from) row.t[(tile * kTileColumns + c) * row.pitch] = x[c];
}

// Applies to a tile the updates of all columns before j, which are visited.
__device__ inline void bring(Row& row, const float* N, int tile, int j) {
  const int from = static_cast<int>(row.done >> 8 * tile) & 255;
  if (from >= j) return;
  float x[kTileColumns];
  get_tile(row, tile, x);
  accumulate<-1>(x, row.t, row.pitch, N + tile_offset(tile), from, j);
  put_tile(row, tile, 0, x);
  row.done += static_cast<uint64_t>(j - from) << 8 * tile;
}

// Columns [j, end) are as they must be when column j is next; j's own tile always is.
__device__ inline void look_ahead(Row& row, const float* N, int j, int end) {
  for (int tile = j / kTileColumns + 1; tile * kTileColumns < end; ++tile) bring(row, N, tile, j);
}

// Bits of the `drop` least of `count` <= most scores at t; of equals the lower index goes first.
template <int most>
__device__ inline unsigned drop_few(const float* t, int pitch, const float* D, int count,
                                    int drop) {
  float score[most];
  int rank[most];
#pragma unroll
  for (int i = 0; i < most; ++i) {
    const float w = i < count ? t[i * pitch] : 0.f;
    score[i] = i < count ? w * w * D[i] : __uint_as_float(0x7f800000u);
    rank[i] = 0;
  }
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < most; ++i) {
#pragma unroll
    for (int k = 0; k < i; ++k) {
      const bool first = score[k] <= score[i];
      rank[i] += first;
      rank[k] += !first;
    }
  }
#pragma unroll
  for (int i = 0; i < most; ++i) bits |= (rank[i] < drop ? 1u : 0u) << i;
  return bits;
}

__device__ inline unsigned drop_many(const float* t, int pitch, const float* D, int count,
                                     int drop) {
  unsigned bits = 0;
  for (int i = 0; i < count; ++i) {
    const float mine = t[i * pitch] * t[i * pitch] * D[i];
    int rank = 0;
    for (int k = 0; k < count; ++k) {
      const float other = t[k * pitch] * t[k * pitch] * D[k];
      rank += other < mine || (other == mine && k < i);
    }
    bits |= (rank < drop ? 1u : 0u) << i;
  }
  return bits;
}

// The mask of the N:M group that starts at column j.
__device__ inline void choose(const Obs& p, int width, Row& row, const float* D, int j) {
  const int m = static_cast<int>(p.m), count = width - j < m ? width - j : m;
  const int drop = count - static_cast<int>(p.n);
  const float* t = row.t + j * row.pitch;
  if (drop <= 0) return;
  row.prune(j, m <= 4   ? drop_few<4>(t, row.pitch, D + j, count, drop)
               : m <= 8 ? drop_few<8>(t, row.pitch, D + j, count, drop)
                        : drop_many(t, row.pitch, D + j, count, drop));
}

// The grid of columns [first, last) as they are now.
__device__ inline Fitted fit_columns(const Grid& grid, const Row& row, int first, int last) {
  const float* t = row.t;
  const int pitch = row.pitch;
  const float top = top_code(grid);
  float low = 0.f, high = 0.f;
  for (int j = first; j < last; ++j) {
    low = fminf(low, t[j * pitch]);
    high = fmaxf(high, t[j * pitch]);
  }
  return fit_range(grid, low, high, [&](const Fitted& fit) {
    float sum = 0.f;
    for (int j = first; j < last; ++j) sum += rounding_error(t[j * pitch], fit, top);
    return sum;
  });
}

}  // namespace distaya
