// The k smallest OBS scores of a block over all rows, exactly: radix select on the bits of the
// score (a non-negative float orders like its bits) in three histogram passes, then ties by index.
#pragma once

#include "core/cuda.cuh"
#include "obs/obs.h"

namespace distaya {

inline constexpr int kBins = 2048;  // 11 bits a pass: 31..21, 20..10, 9..0

struct SelectState {
  unsigned long long counts[kBins];
  uint32_t prefix;    // bits of the threshold found so far
  int64_t remaining;  // how many of the scores that share the prefix still have to go
};

struct SelectBlock {
  const float* T;  // [rows, kObsBlock]
  const float* D;  // [kObsBlock]
  int64_t rows, cols, i1;
  int width;
  int64_t k;      // how many go
  bool all_ties;  // every score equal to the threshold goes, as published
  int64_t* ties;  // [rows + 1]
  SelectState* state;
  bool* mask;  // [rows, cols] true = kept; columns [i1, i1 + width) are written
};

__device__ inline uint32_t score_bits(const SelectBlock& s, int64_t row, int j) {
  const float t = s.T[row * kObsBlock + j];
  return __float_as_uint(t * t * s.D[j]);
}

__device__ inline int shift_of(int pass) { return pass == 0 ? 21 : pass == 1 ? 10 : 0; }

__device__ inline uint32_t settled_bits(int pass) {  // which bits earlier passes have fixed
  return pass == 0 ? 0u : pass == 1 ? 0xffe00000u : 0xfffffc00u;
}

__global__ void start_select_kernel(SelectState* state, int64_t k) {
  for (int i = threadIdx.x; i < kBins; i += blockDim.x) state->counts[i] = 0;
  if (threadIdx.x == 0) state->prefix = 0, state->remaining = k;
}

__global__ void __launch_bounds__(256) histogram_kernel(const SelectBlock s, int pass) {
  __shared__ unsigned local[kBins];  // integer counts: order cannot change them
  for (int i = threadIdx.x; i < kBins; i += 256) local[i] = 0;
  __syncthreads();
  const uint32_t settled = settled_bits(pass), prefix = s.state->prefix;
  const int64_t step = static_cast<int64_t>(gridDim.x) * 256;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x; t < s.rows * s.width;
       t += step) {
    const uint32_t u = score_bits(s, t / s.width, static_cast<int>(t % s.width));
    if ((u & settled) != prefix) continue;
    const uint32_t bin = pass == 2 ? u & 1023u : u >> shift_of(pass) & 2047u;
    atomicAdd(&local[bin], 1u);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += 256)
    if (local[i]) atomicAdd(&s.state->counts[i], static_cast<unsigned long long>(local[i]));
}

// Finds the bin that holds the last score to go, extends the prefix, clears the histogram.
__global__ void advance_kernel(SelectState* state, int pass) {
  if (threadIdx.x != 0) return;
  int64_t remaining = state->remaining;
  uint32_t bin = 0;
  while (bin + 1 < kBins && static_cast<int64_t>(state->counts[bin]) < remaining)
    remaining -= static_cast<int64_t>(state->counts[bin++]);
  state->prefix |= bin << shift_of(pass);
  state->remaining = remaining;
  for (int i = 0; i < kBins; ++i) state->counts[i] = 0;
}

// ties[row + 1] = scores of the row equal to the threshold. One warp per row.
__global__ void count_ties_kernel(const SelectBlock s) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= s.rows) return;
  int count = 0;
  for (int j = lane; j < s.width; j += 32) count += score_bits(s, row, j) == s.state->prefix;
  count = cuda::warp_sum(count);
  if (lane == 0) s.ties[row + 1] = count;
}

// In place: ties[row] = ties in rows before it. One block; each thread sums a run of rows.
__global__ void __launch_bounds__(1024) scan_ties_kernel(int64_t* ties, int64_t rows) {
  __shared__ int64_t before[1024];
  const int64_t run = (rows + 1023) / 1024, first = threadIdx.x * run + 1;
  const int64_t last = first + run < rows + 1 ? first + run : rows + 1;
  int64_t sum = 0;
  for (int64_t i = first; i < last; ++i) sum += ties[i];
  before[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    int64_t total = 0;
    for (int i = 0; i < 1024; ++i) {
      const int64_t mine = before[i];
      before[i] = total;
      total += mine;
    }
    ties[0] = 0;
  }
  __syncthreads();
  int64_t total = before[threadIdx.x];
  for (int64_t i = first; i < last; ++i) ties[i] = total += ties[i];
}

// mask = true where kept. One warp per row, so that a tie's rank in its row is a ballot.
__global__ void write_mask_kernel(const SelectBlock s) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= s.rows) return;
  const uint32_t threshold = s.state->prefix;
  int64_t rank = s.ties[row];
  for (int base = 0; base < s.width; base += 32) {
    const int j = base + lane;
    const bool inside = j < s.width;
    const uint32_t u = inside ? score_bits(s, row, j) : 0xffffffffu;
    const bool tie = inside && u == threshold;
    const unsigned tied = __ballot_sync(cuda::kFullWarp, tie);
    const int64_t mine = rank + __popc(tied & ((1u << lane) - 1u));
    const bool gone = u < threshold || (tie && (s.all_ties || mine < s.state->remaining));
    if (inside) s.mask[row * s.cols + s.i1 + j] = !(gone && s.k > 0);
    rank += __popc(tied);
  }
}

inline void select_block(const SelectBlock& s, cudaStream_t stream) {
  constexpr int kRowsPerBlock = 8;
  const unsigned rows = cuda::grid_of(cuda::ceil_div<int64_t>(s.rows, kRowsPerBlock));
  cuda::launch(start_select_kernel, 1, 256, 0, stream, s.state, s.k);
  const unsigned blocks = cuda::grid_of(cuda::ceil_div<int64_t>(s.rows * s.width, 256), 1024);
  for (int pass = 0; pass < 3; ++pass) {
    cuda::launch(histogram_kernel, blocks, 256, 0, stream, s, pass);
    cuda::launch(advance_kernel, 1, 32, 0, stream, s.state, pass);
  }
  cuda::launch(count_ties_kernel, rows, kRowsPerBlock * 32, 0, stream, s);
  cuda::launch(scan_ties_kernel, 1, 1024, 0, stream, s.ties, s.rows);
  cuda::launch(write_mask_kernel, rows, kRowsPerBlock * 32, 0, stream, s);
}

}  // namespace distaya
