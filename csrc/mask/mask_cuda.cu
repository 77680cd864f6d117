// Exact k of each row or column: radix select, 8 bits of the key at a time from the top. A
// histogram of the digit among the keys that share the digits found so far names the next digit;
// after four rounds the cut key is known, with the number of its ties that stay.
#include "core/cuda.cuh"
#include "mask/mask.h"
#include "mask/ordered.cuh"

namespace distaya::mask {

void keep_matrix_cuda(const KeepK& p, int device, cudaStream_t stream);  // matrix_cuda.cu

namespace {

using cuda::ceil_div;
using cuda::grid_of;
using cuda::launch;

constexpr int kThreads = 256;  // one per digit in the scan of the histogram
constexpr int kWarps = kThreads / 32;

// One block per row.
__global__ void __launch_bounds__(kThreads) row_kernel(const KeepK p) {
  __shared__ int bins[256];
  __shared__ int part[kWarps];
  __shared__ uint32_t cut;
  __shared__ int rank, equal;  // k-th largest counted inside the bin; size of the bin
  for (int64_t i = blockIdx.x; i < p.rows; i += gridDim.x) {
    const float* scores = p.scores + i * p.cols;
    uint8_t* mask = p.mask + i * p.cols;
    if (threadIdx.x == 0) cut = 0, rank = static_cast<int>(p.k), equal = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
      bins[threadIdx.x] = 0;
      __syncthreads();
      const uint32_t found = cut;
      for (int64_t j = threadIdx.x; j < p.cols; j += kThreads) {
        const float x = scores[j];
        const uint32_t key = ordered(x);
        if (shift == 24 && is_nan(x)) report_nan(p.bad, i * p.cols + j);
        if (shift == 24 || (key ^ found) >> (shift + 8) == 0)
          atomicAdd(&bins[key >> shift & 255], 1);
      }
      __syncthreads();
      // Thread t looks at digit 255 - t: how many keys have a digit at least that large?
      const int digit = 255 - static_cast<int>(threadIdx.x), mine = bins[digit], wanted = rank;
      const int from_here = block_scan(mine, part);
      if (from_here - mine < wanted && wanted <= from_here) {  // exactly one thread, none if k = 0
        cut = found | static_cast<uint32_t>(digit) << shift;
        rank = wanted - (from_here - mine);
        equal = mine;
      }
      __syncthreads();
    }
    const uint32_t at = cut;
    const int stay = rank;
    const bool all = stay == equal;
    int before = 0;  // ties to the left of this stretch of kThreads columns
    for (int64_t j0 = 0; j0 < p.cols; j0 += kThreads) {
      const int64_t j = j0 + threadIdx.x;
      const uint32_t key = j < p.cols ? ordered(scores[j]) : 0;
      const bool tie = j < p.cols && key == at;
      bool keep = p.k > 0 && (key > at || tie);
      if (!all && before < stay) {  // the same for the whole block
        const int upto = block_scan(static_cast<int>(tie), part);
        if (tie && before + upto > stay) keep = false;
        if (threadIdx.x == kThreads - 1) rank = upto;
        __syncthreads();
        before += rank;
        __syncthreads();
      } else if (!all && tie) {
        keep = false;
      }
      if (j < p.cols) mask[j] = keep;
    }
    __syncthreads();  // cut, rank and bins start over
  }
}

constexpr int kSide = 32;   // columns per block: one warp's width, so rows are read coalesced
constexpr int kSlices = 8;  // warps, each with its own contiguous slice of the rows
constexpr int kAhead = 8;   // rows read before the first is used. 4096 columns make 128 blocks of
                            // 256 threads: with one load each under way the reads would wait for
                            // memory, 128 KB at a time

// body(row, score) for rows first .. last - 1 of column j, in order.
template <class Body>
__device__ void each_score(const KeepK& p, int64_t j, int64_t first, int64_t last,
                           const Body& body) {
  int64_t i = first;
  for (; i + kAhead <= last; i += kAhead) {
    float x[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) x[a] = p.scores[(i + a) * p.cols + j];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) body(i + a, x[a]);
  }
  for (; i < last; ++i) body(i, p.scores[i * p.cols + j]);
}

// One block per 32 columns. bins[digit][column]: a column is always the same bank, so the lanes of
// a warp never collide and only the warps do.
__global__ void __launch_bounds__(kSide* kSlices) column_kernel(const KeepK p) {
  __shared__ int bins[256][kSide];
  __shared__ uint32_t cut[kSide];
  __shared__ int rank[kSide];
  __shared__ int ties[kSlices][kSide];  // of a slice of the rows; before that, of the digits
  constexpr int kDigits = 256 / kSlices;
  const int lane = threadIdx.x % kSide, slice = threadIdx.x / kSide;
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kSide + lane;
  const bool real = j < p.cols;
  const int64_t height = ceil_div<int64_t>(p.rows, kSlices), first = slice * height;
  const int64_t last = !real ? first : first + height < p.rows ? first + height : p.rows;
  if (slice == 0) cut[lane] = 0, rank[lane] = static_cast<int>(p.k);
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int b = slice; b < 256; b += kSlices) bins[b][lane] = 0;
    __syncthreads();
    const uint32_t found = cut[lane];
    each_score(p, j, first, last, [&](int64_t i, float x) {
      const uint32_t key = ordered(x);
      if (shift == 24 && is_nan(x)) report_nan(p.bad, i * p.cols + j);
      if (shift == 24 || (key ^ found) >> (shift + 8) == 0)
        atomicAdd(&bins[key >> shift & 255][lane], 1);
    });
    __syncthreads();
    // Warp s looks for its column's digit among 32 of them, the highest for s = 0.
    const int top = 255 - slice * kDigits, wanted = rank[lane];
    int here = 0;
    for (int d = 0; d < kDigits; ++d) here += bins[top - d][lane];
    ties[slice][lane] = here;
    __syncthreads();
    int left = wanted;
    for (int s = 0; s < slice; ++s) left -= ties[s][lane];
    if (0 < left && left <= here) {  // in one warp, none if k = 0
      int digit = top;
      while (bins[digit][lane] < left) left -= bins[digit--][lane];
      cut[lane] = found | static_cast<uint32_t>(digit) << shift;
      rank[lane] = left;
    }
    __syncthreads();
  }
  const uint32_t at = cut[lane];
  int count = 0;
  each_score(p, j, first, last, [&](int64_t, float x) { count += ordered(x) == at; });
  ties[slice][lane] = count;
  __syncthreads();
  int stay = rank[lane];  // ties that remain for this slice once the slices above took theirs
  for (int s = 0; s < slice; ++s) stay -= ties[s][lane];
  each_score(p, j, first, last, [&](int64_t i, float x) {
    const uint32_t key = ordered(x);
    p.mask[i * p.cols + j] = p.k > 0 && (key > at || (key == at && stay-- > 0));
  });
}

}  // namespace

void keep_k_cuda(const KeepK& p, int device, Stream stream) {
  const cuda::DeviceGuard guard(device);
  const cudaStream_t s = cuda::raw(stream);
  if (p.along == Along::row) {
    launch(row_kernel, grid_of(p.rows), kThreads, 0, s, p);
  } else if (p.along == Along::column) {
    launch(column_kernel, grid_of(ceil_div<int64_t>(p.cols, kSide)), kSide * kSlices, 0, s, p);
  } else {
    return keep_matrix_cuda(p, device, s);
  }
}

}  // namespace distaya::mask
