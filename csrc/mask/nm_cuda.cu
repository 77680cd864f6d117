// N of every M: a tile of groups is staged in shared memory as keys, then each thread ranks single
// members against their own group.
#include "core/cuda.cuh"
#include "mask/mask.h"
#include "mask/ordered.cuh"

namespace distaya::mask {
namespace {

using cuda::ceil_div;
using cuda::grid_of;
using cuda::launch;

constexpr int kThreads = 256;

// Rank of member i among m keys `stride` apart; of equals the earlier ranks first.
__device__ inline int rank_of(const uint32_t* keys, int stride, int m, int i) {
  const uint32_t mine = keys[i * stride];
  int rank = 0;
#pragma unroll 4  // more would spill on sm_100
  for (int j = 0; j < m; ++j) {
    const uint32_t other = keys[j * stride];
    rank += other > mine || (other == mine && j < i);
  }
  return rank;
}

constexpr int kTile = 1024;  // scores per block: as many whole groups as fit

// Along inputs groups are consecutive in memory and never straddle rows: one flat run of them.
__global__ void __launch_bounds__(kThreads) inputs_kernel(const KeepNM p) {
  __shared__ uint32_t keys[kTile];
  const int tile = kTile / p.m * p.m;
  const int64_t size = p.rows * p.cols;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * tile; base < size;
       base += static_cast<int64_t>(gridDim.x) * tile) {
    const int here = size - base < tile ? static_cast<int>(size - base) : tile;
    for (int t = threadIdx.x; t < here; t += kThreads) {
      const float x = p.scores[base + t];
      if (is_nan(x)) report_nan(p.bad, base + t);
      keys[t] = ordered(x);
    }
    __syncthreads();
    for (int t = threadIdx.x; t < here; t += kThreads) {
      const int i = t % p.m;
      p.mask[base + t] = rank_of(keys + (t - i), 1, p.m, i) < p.n;
    }
    __syncthreads();  // keys are overwritten by the next tile
  }
}

constexpr int kSide = 64;  // columns per block

// Along outputs a tile is one group of rows by 64 columns; lanes run over columns throughout.
__global__ void __launch_bounds__(kThreads) outputs_kernel(const KeepNM p) {
  __shared__ uint32_t keys[32][kSide];
  const int lane = threadIdx.x % kSide, first = threadIdx.x / kSide;
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kSide + lane;
  for (int64_t group = blockIdx.y; group < p.rows / p.m; group += gridDim.y) {
    const int64_t top = group * p.m * p.cols + j;
    for (int i = first; i < p.m; i += kThreads / kSide) {
      const float x = j < p.cols ? p.scores[top + i * p.cols] : 0.f;
      if (is_nan(x)) report_nan(p.bad, top + i * p.cols);
      keys[i][lane] = ordered(x);
    }
    __syncthreads();
    for (int i = first; i < p.m; i += kThreads / kSide)
      if (j < p.cols) p.mask[top + i * p.cols] = rank_of(&keys[0][lane], kSide, p.m, i) < p.n;
    __syncthreads();  // keys are overwritten by the next group
  }
}

}  // namespace

void keep_nm_cuda(const KeepNM& p, int device, Stream stream) {
  const cuda::DeviceGuard guard(device);
  const cudaStream_t s = cuda::raw(stream);
  if (p.of_outputs) {
    const dim3 grid(grid_of(ceil_div<int64_t>(p.cols, kSide)), grid_of(p.rows / p.m, 65535));
    launch(outputs_kernel, grid, kThreads, 0, s, p);
  } else {
    const int tile = kTile / p.m * p.m;
    launch(inputs_kernel, grid_of(ceil_div<int64_t>(p.rows * p.cols, tile)), kThreads, 0, s, p);
  }
}

}  // namespace distaya::mask
