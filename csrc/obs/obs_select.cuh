// The k smallest OBS scores of a block over all rows, exactly: radix select on the bits of the
// score (a non-negative float orders like its bits; 31 of them in three histogram passes), then the
// index at which ties stop going. Four launches; what one thread block must do with the sums of all
// is done by whichever of them comes last (a ticket), so the result does not depend on the order.
//
// Bytes: each pass reads T (Aya's stack of 34816 rows: 18 MB, which the L2 cache holds), the first
// also reads W and writes T. Bound: L2 reads, then the shared atomics of the first pass.
#pragma once

#include "core/cuda.cuh"
#include "obs/obs.h"

namespace distaya {

inline constexpr int kChunks = 1024;  // runs of rows whose ties are counted apart
inline constexpr int kSelectThreads = 256;
inline constexpr int64_t kAllTies = INT64_MAX;

using Count = unsigned long long;

// Between sweeps of blocks counts, ties and ticket are all zero. What a pass reads and what its
// last thread block writes are different words: nothing is read and written in one launch.
struct SelectState {
  Count counts[kBins];
  Count ties[kChunks];
  unsigned ticket;
  uint32_t prefix[kPasses + 1];  // [pass]: bits of the threshold found before it
  int64_t left[kPasses + 1];     // [pass]: how many of the scores that share them have to go
  bool search;                   // whether `cut` is still to be found
  int64_t cut;                   // scores equal to the threshold go up to this row * kObsBlock + j
};

struct SelectBlock {
  float* T;        // [rows, kObsBlock]: E P, made T by the first pass
  const void* W;   // [rows, cols] of obs.h
  const float* D;  // [width]
  int64_t rows, cols, i1;
  int width;
  int64_t k;      // how many go, at least 1
  bool all_ties;  // every score equal to the threshold goes, as published
  SelectState* state;
  Count* counts;        // state's, or those of this rank for the others: zeros between launches
  const Count* theirs;  // [world][bins_of(pass)], if world > 1
  int64_t rank, world;
};

__device__ inline uint32_t score_bits(float t, float d) {
  return __float_as_uint(t * t * d) & 0x7fffffffu;
}

// Whether score u at row * kObsBlock + j goes.
__device__ inline bool goes(uint32_t u, int64_t index, uint32_t threshold, int64_t cut) {
  return u < threshold || (u == threshold && index <= cut);
}

__global__ void __launch_bounds__(kSelectThreads) start_select_kernel(SelectState* state) {
  for (int i = threadIdx.x; i < kBins; i += kSelectThreads) state->counts[i] = 0;
  for (int i = threadIdx.x; i < kChunks; i += kSelectThreads) state->ties[i] = 0;
  if (threadIdx.x == 0) state->ticket = 0;
}

// Exclusive sum over the block's threads; part: [warps] of shared memory.
__device__ inline Count sum_before(Count x, Count* part) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Count sum = x;
  for (int d = 1; d < 32; d *= 2) {
    const Count below = __shfl_up_sync(cuda::kFullWarp, sum, d);
    if (lane >= d) sum += below;
  }
  __syncthreads();  // part may still be read from the last call
  if (lane == 31) part[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += part[w];
  return sum - x;
}

// True in all threads of the block that is the last of the grid to get here.
__device__ inline bool comes_last(SelectState* state) {
  __shared__ bool last;
  __threadfence();  // this thread's sums before the ticket
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(&state->ticket, 1u) == gridDim.x - 1;
    if (last) atomicExch(&state->ticket, 0u);
    __threadfence();  // the others' sums after it
  }
  __syncthreads();
  return last;
}

// The place of the `wanted`-th (from 1) of `total` runs of things: run i, `rest`-th in it. Called
// by the whole block; the one thread that finds it calls found(i, rest, size of the run). Clears
// the runs for their next use.
template <class Found>
__device__ inline void find_run(Count* runs, int total, Count wanted, const Found& found) {
  __shared__ Count part[kSelectThreads / 32];
  const int each = total / kSelectThreads, first = threadIdx.x * each;
  Count mine[kBins / kSelectThreads], sum = 0;
#pragma unroll
  for (int i = 0; i < kBins / kSelectThreads; ++i) {
    mine[i] = i < each ? atomicExch(&runs[first + i], Count{0}) : 0;
    sum += mine[i];
  }
  Count before = sum_before(sum, part);
#pragma unroll
  for (int i = 0; i < kBins / kSelectThreads; ++i) {
    if (before < wanted && wanted <= before + mine[i]) found(first + i, wanted - before, mine[i]);
    before += mine[i];
  }
}

// The threshold's next digit. First pass: also T += W.
template <int pass, class T>
__global__ void __launch_bounds__(kSelectThreads) histogram_kernel(const SelectBlock s) {
  constexpr int kRows = kSelectThreads / 32;  // a warp takes a row, a lane four columns of it
  constexpr int kHere = bins_of(pass);
  // Bits below those that earlier passes have fixed.
  constexpr int kSettled = shift_of(pass ? pass - 1 : 0);
  __shared__ unsigned local[kHere];  // integer counts: order cannot change them
  for (int i = threadIdx.x; i < kHere; i += kSelectThreads) local[i] = 0;
  __syncthreads();
  const uint32_t prefix = pass ? s.state->prefix[pass] : 0;
  const int j = threadIdx.x % 32 * 4;
  float d[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = j + i < s.width ? s.D[j + i] : 0.f;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / 32;
  for (int64_t row = first; row < s.rows && j < s.width; row += gridDim.x * kRows) {
    auto* at = reinterpret_cast<float4*>(s.T + row * kObsBlock + j);
    float4 t = pass == 0 && s.i1 == 0 ? float4{} : *at;
    float x[4] = {t.x, t.y, t.z, t.w};
    if constexpr (pass == 0) {
      const T* W = static_cast<const T*>(s.W) + row * s.cols + s.i1 + j;
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = j + i < s.width ? x[i] + cuda::load_float(W + i) : 0.f;
      *at = make_float4(x[0], x[1], x[2], x[3]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t u = score_bits(x[i], d[i]);
      const bool counts = pass == 0 || u >> kSettled == prefix;
      if (j + i < s.width && counts) atomicAdd(&local[u >> shift_of(pass) & (kHere - 1)], 1u);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kHere; i += kSelectThreads)
    if (local[i]) atomicAdd(&s.counts[i], static_cast<Count>(local[i]));
  if (s.world > 1) return;  // pick_kernel goes on
  if (!comes_last(s.state)) return;
  const int64_t left = pass ? s.state->left[pass] : s.k;
  find_run(s.state->counts, kHere, static_cast<Count>(left), [&](int bin, Count rest, Count size) {
    constexpr int kBits = pass == 0 ? 11 : 10;
    s.state->prefix[pass + 1] = prefix << kBits | static_cast<uint32_t>(bin);
    s.state->left[pass + 1] = static_cast<int64_t>(rest);
    if (pass + 1 < kPasses) return;
    s.state->search = !s.all_ties && rest < size;
    s.state->cut = kAllTies;
  });
}

// The threshold's next digit from the counts of all ranks; after the last one, how many of this
// rank's ties go: those of lower ranks go first.
template <int pass>
__global__ void __launch_bounds__(kSelectThreads) pick_kernel(const SelectBlock s) {
  constexpr int kHere = bins_of(pass);
  const uint32_t prefix = pass ? s.state->prefix[pass] : 0;
  const int64_t left = pass ? s.state->left[pass] : s.k;
  for (int i = threadIdx.x; i < kHere; i += kSelectThreads) {
    Count sum = 0;
    for (int64_t r = 0; r < s.world; ++r) sum += s.theirs[r * kHere + i];
    s.state->counts[i] = sum;
    s.counts[i] = 0;
  }
  __syncthreads();
  find_run(s.state->counts, kHere, static_cast<Count>(left), [&](int bin, Count rest, Count) {
    s.state->prefix[pass + 1] = prefix * kHere + static_cast<uint32_t>(bin);
    if (pass + 1 == kPasses) {
      for (int64_t r = 0; r < s.rank; ++r) {
        const Count before = s.theirs[r * kHere + bin];
        rest -= before < rest ? before : rest;
      }
      const bool all = s.all_ties || rest >= s.theirs[s.rank * kHere + bin];
      s.state->search = !all && rest > 0;
      s.state->cut = all ? kAllTies : -1;  // -1: none, unless it is searched for
    }
    s.state->left[pass + 1] = static_cast<int64_t>(rest);
  });
}

// Finds the last tie that goes, where not all do: ties are counted by runs of rows, then the run
// that holds it is walked in order.
__global__ void __launch_bounds__(kSelectThreads) find_cut_kernel(const SelectBlock s) {
  if (!s.state->search) return;
  __shared__ Count part[kSelectThreads / 32];
  __shared__ int64_t run, rest;
  const uint32_t threshold = s.state->prefix[kPasses];
  const int64_t height = cuda::ceil_div<int64_t>(s.rows, kChunks);
  const int j = threadIdx.x % kObsBlock;
  const float d = j < s.width ? s.D[j] : 0.f;
  const auto tied = [&](int64_t row, int64_t last) {
    return row < last && j < s.width && score_bits(s.T[row * kObsBlock + j], d) == threshold;
  };
  constexpr int kRows = kSelectThreads / static_cast<int>(kObsBlock);  // at a time
  const int g = threadIdx.x / static_cast<int>(kObsBlock);
  const auto end = [&](int64_t first) { return first + height < s.rows ? first + height : s.rows; };
  const int64_t mine = blockIdx.x * height;
  int count = 0;
#pragma unroll 1  // more would spill on sm_120
  for (int64_t row = mine; row < end(mine); row += kRows) count += tied(row + g, end(mine));
  count = cuda::warp_sum(count);
  if (threadIdx.x % 32 == 0 && count)
    atomicAdd(&s.state->ties[blockIdx.x], static_cast<Count>(count));
  if (!comes_last(s.state)) return;
  find_run(s.state->ties, kChunks, static_cast<Count>(s.state->left[kPasses]),
           [&](int at, Count left, Count) { run = at, rest = static_cast<int64_t>(left); });
  __syncthreads();
  const int64_t first = run * height, last = end(first), wanted = rest;
  int64_t before = 0;  // ties of the run above `row`
  for (int64_t row = first; row < last && before < wanted; row += kRows) {
    const bool tie = tied(row + g, last);
    const int64_t rank = before + static_cast<int64_t>(sum_before(tie, part)) + 1;
    if (tie && rank == wanted) s.state->cut = (row + g) * kObsBlock + j;
    for (int w = 0; w < kSelectThreads / 32; ++w) before += static_cast<int64_t>(part[w]);
  }
}

// Queues the exchange of a pass, if there are other ranks.
inline void exchange(const Obs& p, int pass) {
  if (!p.among) return;
  p.among->exchange(bins_of(pass));
  cuda::check_cuda(cudaSetDevice(p.device));  // the callee may have had its own
}

template <int pass, class T>
void find_digit(const SelectBlock& s, const Obs& p, cudaStream_t stream) {
  const unsigned blocks = cuda::grid_of(cuda::ceil_div<int64_t>(s.rows, 8), 512);
  cuda::launch(histogram_kernel<pass, T>, blocks, kSelectThreads, 0, stream, s);
  exchange(p, pass);
  if (s.world > 1) cuda::launch(pick_kernel<pass>, 1, kSelectThreads, 0, stream, s);
}

// Afterwards the threshold is state->prefix[kPasses], and T is complete.
template <class T>
void select_block(const SelectBlock& s, const Obs& p, cudaStream_t stream) {
  find_digit<0, T>(s, p, stream);
  find_digit<1, float>(s, p, stream);
  find_digit<2, float>(s, p, stream);
  const int64_t height = cuda::ceil_div<int64_t>(s.rows, kChunks);
  cuda::launch(find_cut_kernel, cuda::grid_of(cuda::ceil_div(s.rows, height)), kSelectThreads, 0,
               stream, s);
}

}  // namespace distaya
