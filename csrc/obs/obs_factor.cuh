// What the sweep needs of R alone, made before the blocks that use it: N_b = M_bb^-1 of every
// diagonal block in one launch, and the panels P_b = M[:i1, b] N_b of several blocks in another.
#pragma once

#include "obs/obs_tiles.cuh"

namespace distaya {

struct Factor {
  const float* R;      // [cols, cols]
  int64_t cols, step;  // step: columns per block
  float* N;            // [blocks][kPacked]
  float* D;            // [cols] diag(R)^2
};

constexpr int kInvertRows =
    4;  // rows of N that a column's threads share: thread g has g, g + 4, ..
constexpr int kInvertThreads = kInvertRows * kB;

// One thread block inverts one diagonal block. M N = I from the bottom row up: when row i of N is
// final, M[:i, i] times it leaves the rows above. All sums are in double (on sm_90 two cycles an
// FMA: 128 steps of at most 32 FMA per thread, some 20 thousand cycles, all blocks at once).
__global__ void __launch_bounds__(kInvertThreads) invert_kernel(const Factor p) {
  __shared__ float r[kB * (kB + 1) / 2];  // upper triangle, column by column
  __shared__ double above[2][kB];         // row i of N over r_ii, for the even and the odd rows
  const int64_t i1 = blockIdx.x * p.step;
  const int width = static_cast<int>(p.cols - i1 < p.step ? p.cols - i1 : p.step);
  const float* R = p.R + i1 * p.cols + i1;
  const int j = threadIdx.x % kB, g = threadIdx.x / kB;
  for (int i = g; i < width; i += kInvertRows)
    if (i <= j && j < width) r[j * (j + 1) / 2 + i] = R[i * p.cols + j];
  __syncthreads();
  double s[kB / kInvertRows];  // rows g, g + 4, ... of column j
#pragma unroll
  for (int e = 0; e < kB / kInvertRows; ++e) s[e] = j < width && e * kInvertRows + g == j;
#pragma unroll
  for (int e = kB / kInvertRows - 1; e >= 0; --e) {
#pragma unroll 1
    for (int h = kInvertRows - 1; h >= 0; --h) {
      const int i = e * kInvertRows + h;
      if (i >= width) continue;
      const float* column = r + i * (i + 1) / 2;
      if (g == h) above[i % 2][j] = s[e] / column[i];
      __syncthreads();  // one a step: the other buffer is read until the step after next
      const double x = above[i % 2][j];
#pragma unroll
      for (int d = 0; d < e; ++d) s[d] -= column[d * kInvertRows + g] * x;
      if (g < h) s[e] -= column[e * kInvertRows + g] * x;
    }
  }
  const int tile = j / kTileColumns;
  float* N =
      p.N + static_cast<int64_t>(blockIdx.x) * kPacked + tile_offset(tile) + j % kTileColumns;
#pragma unroll
  for (int e = 0; e < kB / kInvertRows; ++e) {
    const int i = e * kInvertRows + g;
    if (i < (tile + 1) * kTileColumns) N[i * kTileColumns] = static_cast<float>(s[e]);
  }
  if (g == 0 && j < width) {
    const float d = r[j * (j + 1) / 2 + j];
    p.D[i1 + j] = d * d;
  }
}

constexpr int kPanelRows = 32, kPanelWarps = kTiles / 2, kPanelPitch = kPanelRows + 1;
constexpr int kPanelShared = (kPacked + kB * kPanelPitch) * 4;  // bytes

// P[b][row] = M[row, b] N_b for rows above block first + blockIdx.y, 32 rows a thread block. fp32
// FMA: for 14336 columns 7.4e9 of them against the 4.2e11 (three times over) of E P itself with
// 4096 rows. A warp takes a low tile and its mirror image, so that all have the same work.
__global__ void __launch_bounds__(kPanelWarps * 32)
    panel_kernel(const Factor p, int64_t first, float* P) {
  DISTAYA_DYNAMIC_SHARED(float, shared);
  float *N = shared, *M = shared + kPacked;  // M: [column of the block][row], transposed
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t i1 = (first + blockIdx.y) * p.step;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kPanelRows;
  if (row0 >= i1) return;
  const int width = static_cast<int>(p.cols - i1 < p.step ? p.cols - i1 : p.step);
  load_packed(p.N + (first + blockIdx.y) * kPacked, N);
  for (int j = lane; j < kB; j += 32) {
    const float diagonal = j < width ? p.R[(i1 + j) * p.cols + i1 + j] : 1.f;
    for (int i = warp; i < kPanelRows; i += kPanelWarps) {
      const bool there = j < width && row0 + i < i1;
      M[j * kPanelPitch + i] = there ? p.R[(row0 + i) * p.cols + i1 + j] / diagonal : 0.f;
    }
  }
  __syncthreads();
  const int64_t row = row0 + lane;
  for (int tile : {warp, kTiles - 1 - warp}) {
    float x[kTileColumns] = {};
    accumulate<1>(x, M + lane, kPanelPitch, N + tile_offset(tile), 0, (tile + 1) * kTileColumns);
    auto* to = reinterpret_cast<float4*>(P + (blockIdx.y * p.cols + row) * kB) + 4 * tile;
    if (row < i1)
#pragma unroll
      for (int v = 0; v < kTileColumns / 4; ++v)
        to[v] = make_float4(x[4 * v], x[4 * v + 1], x[4 * v + 2], x[4 * v + 3]);
  }
}

}  // namespace distaya
