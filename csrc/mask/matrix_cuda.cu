// Exact k of a whole matrix: the radix select of mask_cuda.cu with one histogram in global memory
// that all blocks add to, and a one-block kernel between the rounds that names the next digit.
// Where rows lie on several ranks, their histograms are exchanged before it and it adds them up.
#include "core/cuda.cuh"
#include "mask/mask.h"
#include "mask/ordered.cuh"

namespace distaya::mask {

void keep_matrix_cuda(const KeepK& p, int device, cudaStream_t stream);

namespace {

using cuda::ceil_div;
using cuda::launch;

constexpr int kThreads = 256;
using count = unsigned long long;

// KeepK::work as the kernels see it.
struct Work {
  count bins[256];
  count cut;    // digits found so far, the rest zero
  count rank;   // k-th largest counted inside the bin
  count equal;  // size of the bin
  count unused[5];
  count ties[kChunks];  // of each chunk; then how many of them come before the chunk
};

static_assert(sizeof(Work) == kKeepWork * sizeof(int64_t));

struct Matrix {
  const float* scores;
  int64_t size, chunk;  // chunk: consecutive scores per block, a multiple of kThreads
  int64_t k;
  uint8_t* mask;
  int64_t* bad;
  Work* work;
  count* bins;       // [256] of this rank's rows; behind them, where there are other ranks, its NaN
  const count* all;  // [world][pitch] of all ranks: bins itself, if there is but one
  int64_t rank, world, pitch;
  int64_t first;   // place in the whole matrix of this rank's first score
  int64_t* found;  // [1] where its lowest NaN goes: bad, or behind bins
};

__device__ inline int64_t chunk_end(const Matrix& p) {
  const int64_t end = (static_cast<int64_t>(blockIdx.x) + 1) * p.chunk;
  return end < p.size ? end : p.size;
}

__global__ void __launch_bounds__(kThreads) start_kernel(const Matrix p) {
  p.bins[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    *p.found = -1;
    p.work->cut = 0;
    p.work->rank = static_cast<count>(p.k);
    p.work->equal = 0;
  }
}

__global__ void __launch_bounds__(kThreads) histogram_kernel(const Matrix p, int shift) {
  __shared__ unsigned bins[256];  // a chunk of 2^32 scores would be a matrix of 2^44
  bins[threadIdx.x] = 0;
  __syncthreads();
  const uint32_t found = static_cast<uint32_t>(p.work->cut);
  const int64_t end = chunk_end(p);
  for (int64_t t = blockIdx.x * p.chunk + threadIdx.x; t < end; t += kThreads) {
    const float x = p.scores[t];
    const uint32_t key = ordered(x);
    if (shift == 24 && is_nan(x)) report_nan(p.found, p.first + t);
    if (shift == 24 || (key ^ found) >> (shift + 8) == 0) atomicAdd(&bins[key >> shift & 255], 1u);
  }
  __syncthreads();
  if (bins[threadIdx.x]) atomicAdd(&p.bins[threadIdx.x], static_cast<count>(bins[threadIdx.x]));
}

// One block: the digit of the k-th largest, thread t looking at digit 255 - t; the histogram is
// left clean for the next round. After the last digit rank and equal are those of this rank alone,
// whose ties stay after those of lower ranks.
__global__ void __launch_bounds__(kThreads) pick_kernel(const Matrix p, int shift) {
  __shared__ count part[kThreads / 32];
  const int digit = 255 - static_cast<int>(threadIdx.x);
  const count wanted = p.work->rank;
  count mine = 0, before = 0, own = 0;
  for (int64_t r = 0; r < p.world; ++r) {
    const count theirs = p.all[r * p.pitch + digit];
    if (r < p.rank) before += theirs;
    if (r == p.rank) own = theirs;
    mine += theirs;
  }
  p.bins[digit] = 0;
  if (threadIdx.x == 0 && shift == 24 && p.world > 1) {
    count least = p.all[256];  // none is the largest
    for (int64_t r = 1; r < p.world; ++r)
      if (p.all[r * p.pitch + 256] < least) least = p.all[r * p.pitch + 256];
    *p.bad = static_cast<int64_t>(least);
  }
  const count from_here = block_scan(mine, part);  // its barriers come before what is written below
  if (wanted <= from_here - mine || from_here < wanted) return;  // one thread stays, none if k = 0
  p.work->cut |= static_cast<count>(digit) << shift;
  const count rest = wanted - (from_here - mine);
  if (shift > 0) before = 0, own = rest;
  p.work->rank = rest <= before ? 0 : rest - before < own ? rest - before : own;
  p.work->equal = own;
}

__global__ void __launch_bounds__(kThreads) count_ties_kernel(const Matrix p) {
  __shared__ int part[kThreads / 32];
  if (p.work->rank == p.work->equal) return;  // all ties stay: their order is of no interest
  const uint32_t at = static_cast<uint32_t>(p.work->cut);
  const int64_t end = chunk_end(p);
  int mine = 0;
  for (int64_t t = blockIdx.x * p.chunk + threadIdx.x; t < end; t += kThreads)
    mine += ordered(p.scores[t]) == at;
  mine = cuda::warp_sum(mine);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;
  count all = 0;
  for (int w = 0; w < kThreads / 32; ++w) all += static_cast<count>(part[w]);
  p.work->ties[blockIdx.x] = all;
}

// One block, each thread a run of kChunks / kThreads chunks.
__global__ void __launch_bounds__(kThreads) ties_before_kernel(const Matrix p, int64_t chunks) {
  if (p.work->rank == p.work->equal) return;
  __shared__ count part[kThreads / 32];
  constexpr int kRun = kChunks / kThreads;
  const int64_t first = threadIdx.x * kRun;
  count mine[kRun], sum = 0;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    mine[i] = first + i < chunks ? p.work->ties[first + i] : 0;
    sum += mine[i];
  }
  count before = block_scan(sum, part) - sum;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (first + i < chunks) p.work->ties[first + i] = before;
    before += mine[i];
  }
}

__global__ void __launch_bounds__(kThreads) write_kernel(const Matrix p) {
  __shared__ int part[kThreads / 32];
  const uint32_t at = static_cast<uint32_t>(p.work->cut);
  const count stay = p.work->rank;
  const bool all = stay == p.work->equal;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  count before = all ? 0 : p.work->ties[blockIdx.x];
  const int64_t end = chunk_end(p);
  for (int64_t t0 = blockIdx.x * p.chunk; t0 < end; t0 += kThreads) {
    const int64_t t = t0 + threadIdx.x;
    const uint32_t key = t < end ? ordered(p.scores[t]) : 0;
    const bool tie = t < end && key == at;
    bool keep = p.k > 0 && (key > at || tie);
    if (!all) {  // the same for the whole block
      const unsigned tied = __ballot_sync(cuda::kFullWarp, tie);
      if (lane == 0) part[warp] = __popc(tied);
      __syncthreads();
      count rank = before + static_cast<count>(__popc(tied & ((1u << lane) - 1u)));
      for (int w = 0; w < kThreads / 32; ++w) {
        if (w < warp) rank += static_cast<count>(part[w]);
        before += static_cast<count>(part[w]);
      }
      if (tie && rank >= stay) keep = false;
      __syncthreads();  // part is written again
    }
    if (t < end) p.mask[t] = keep;
  }
}

}  // namespace

void keep_matrix_cuda(const KeepK& k, int device, cudaStream_t s) {
  Matrix p{.scores = k.scores,
           .size = k.rows * k.cols,
           .chunk = 0,
           .k = k.k,
           .mask = k.mask,
           .bad = k.bad,
           .work = reinterpret_cast<Work*>(k.work),
           .bins = nullptr,
           .all = nullptr,
           .rank = 0,
           .world = 1,
           .pitch = 256,
           .first = 0,
           .found = k.bad};
  p.bins = p.work->bins;
  p.all = p.bins;
  const Among* among = k.among;
  if (among) {
    p.bins = reinterpret_cast<count*>(among->own);
    p.all = reinterpret_cast<const count*>(among->all);
    p.rank = among->rank, p.world = among->world, p.pitch = kTable;
    p.first = among->first * k.cols;
    p.found = among->own + 256;
  }
  constexpr int64_t kLeast = 16 * kThreads;  // below this a block is mostly overhead
  const int64_t share = ceil_div<int64_t>(p.size, kChunks);
  p.chunk = ceil_div<int64_t>(share < kLeast ? kLeast : share, kThreads) * kThreads;
  const int64_t chunks = ceil_div(p.size, p.chunk);
  const unsigned grid = cuda::grid_of(chunks);
  launch(start_kernel, 1, kThreads, 0, s, p);
  for (int shift = 24; shift >= 0; shift -= 8) {
    launch(histogram_kernel, grid, kThreads, 0, s, p, shift);
    if (among) {
      among->exchange(kTable);
      cuda::check_cuda(cudaSetDevice(device));  // the callee may have had its own
    }
    launch(pick_kernel, 1, kThreads, 0, s, p, shift);
  }
  if (p.size == 0) return;
  launch(count_ties_kernel, grid, kThreads, 0, s, p);
  launch(ties_before_kernel, 1, kThreads, 0, s, p, chunks);
  launch(write_kernel, grid, kThreads, 0, s, p);
}

}  // namespace distaya::mask
