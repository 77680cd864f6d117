// Blocks of 128 columns in slices of 256, last first. A block of columns takes two launches:
//
//   panel   the rows above a finished diagonal block are multiplied by its inverse, which is nearly
//           as accurate as substitution for so small a block;
//   step    thread block 0 updates the next diagonal block, factors and inverts it (block.cuh),
//           while all others update the rest with what the panels brought.
//
// What a slice does to the columns left of the next slice is shared out between the step that ends
// it and the one in the middle of the next, so that each has something to do beside thread block 0,
// whose work, some 30 thousand clocks one after the other (counted), hides behind it while about
// 3300 columns and more are left. Updating over 256 columns rather than 128 halves the traffic: at
// n = 14336 each of the 56 updates moves up to 0.8 GB, for which it takes about as long as for its
// products. Every number has one order of summation, nothing is read back by the host.
#include "cholesky/cholesky.h"
#include "cholesky/factor.cuh"
#include "core/gemm_grid.cuh"

namespace distaya {
namespace {

using namespace cuda;

constexpr int64_t kSlice = 2 * kBlock;  // depth of the trailing update
constexpr int kThreads = kGemmThreads;

__device__ double unit_of(const double* mean) { return *mean > 0 ? *mean : 1.0; }

// One block: statistics of the diagonal in a fixed order, then the damping.
__global__ void __launch_bounds__(kThreads) prepare_kernel(const Cholesky p) {
  __shared__ double sums[kThreads];
  __shared__ int64_t dead[kThreads], bad[kThreads];
  const int t = threadIdx.x;
  double sum = 0;
  int64_t zeros = 0, first = p.n;
  for (int64_t j = t; j < p.n; j += kThreads) {
    const float d = p.H[j * p.n + j];
    sum += d;
    zeros += d == 0;
    if (!isfinite(d) && j < first) first = j;
  }
  sums[t] = sum, dead[t] = zeros, bad[t] = first;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (t < width) {
      sums[t] += sums[t + width];
      dead[t] += dead[t + width];
      bad[t] = bad[t] < bad[t + width] ? bad[t] : bad[t + width];
    }
    __syncthreads();
  }
  if (t == 0) {
    *p.mean = p.n ? sums[0] / static_cast<double>(p.n) : 0.0;
    p.info[kFloored] = 0, p.info[kFirstFloored] = -1;
    p.info[kNotFinite] = bad[0] < p.n ? bad[0] : -1, p.info[kDead] = dead[0];
  }
  __syncthreads();
  const float damp = static_cast<float>(p.damp * unit_of(p.mean));
  for (int64_t j = t; j < p.n; j += kThreads) p.H[j * p.n + j] += damp;
}

// Of C[i, j] -= sum over p of H[i, from + p] H[j, from + p], p < k, the columns first <= j < end
// with i <= j. Bounds are multiples of 128.
struct Triangle {
  int64_t from = 0, k = 0, first = 0, end = 0;

  DISTAYA_HD int64_t before(int64_t column, int side) const {  // tiles left of a column
    return column / side * (column / side + 1) / 2;
  }

  DISTAYA_HD int64_t tiles(int side) const { return before(end, side) - before(first, side); }
};

// A step does the same over its own panels for the diagonal block at `next`, which is then
// factored, and all that is above it; and a triangle left of that.
struct Step {
  int64_t from, k, next;
  int width;  // columns of the diagonal block
  Triangle rest = {};

  int64_t tiles(int side) const {
    return (k > 0 ? next / side * (kBlock / side) : 0) + rest.tiles(side);
  }
};

__device__ void factor_next(const Cholesky& p, const Step& s, float* shared) {
  Diagonal& d = *reinterpret_cast<Diagonal*>(shared);
  float* block = p.H + s.next * p.n + s.next;
  load_block(d, block, p.n, s.width);
  const float least =
      fmaxf(static_cast<float>(p.floor * unit_of(p.mean)), 1.17549435e-38f);  // smallest normal
  factor_block(d, {least, s.next, s.width, p.info});
  for (int t = threadIdx.x; t < kBlock * kBlock; t += kThreads) {
    const int i = t / kBlock, j = t % kBlock;
    p.work[t] = d.dropped[i] ? 0.f : inverse_at(d, i, j);
    if (i <= j && j < s.width) block[i * p.n + j] = d.R[i * kStride + j];
  }
}

// Tile t of a step, in tiles of `side`, and the panels that it takes. t counts what is above the
// diagonal block, then the triangle's; a negative t is one of the diagonal block's.
struct Place {
  int64_t i, j, from, k;

  __device__ Place(int64_t t, const Step& s, int side) : from(s.from), k(s.k) {
    const int64_t high = s.next / side, across = kBlock / side;
    if (t < 0) {
      i = high + (t == -3 ? 1 : 0), j = high + (t < -1 ? 1 : 0);
    } else if (t < high * across) {
      i = t / across, j = high + t % across;
    } else {
      from = s.rest.from, k = s.rest.k;
      place_of_tile(t - high * across + s.rest.before(s.rest.first, side), high, high, true, i, j);
    }
  }
};

template <class Shape>
__global__ void __launch_bounds__(kThreads, Shape::kBlocks)
    step_kernel(const Cholesky p, const Step s) {
  DISTAYA_DYNAMIC_SHARED(float, shared);
  ptx::wait_for_earlier();
  ptx::let_later_start();
  constexpr int kSide = Shape::kRows, kAcross = kBlock / kSide;
  static_assert(kSide == Shape::kCols && (kAcross == 1 || kAcross == 2));
  const bool first = blockIdx.x == 0;
  const int64_t own = s.k > 0 ? kAcross * (kAcross + 1) / 2 : 0, tile = int64_t{blockIdx.x} - 1;
  const int64_t begin = first ? -own : tile, end = first ? 0 : tile + 1;
  const int64_t rows = s.next + s.width;
#pragma unroll 1
  for (int64_t t = begin; t < end; ++t) {
    const Place at(t, s, kSide);
    const float* R = p.H + at.from;
    const Gemm g{rows, rows, at.k, -1, R, p.n, 1, R, 1, p.n, p.H, p.n, true};
    const TileProduct<Shape, true, true> product(g, at.i * kSide, at.j * kSide, shared);
    product.store(g);
  }
  if (!first) return;
  __syncthreads();  // the block is in H
  factor_next(p, s, shared);
}

// In place: a thread block has all columns of its rows.
using PanelTile = TileShape<32, kBlock, 32, 3, 1, 4, 2>;

// X <- X U^T for the rows above the diagonal block at column c, U its inverse in p.work.
__global__ void __launch_bounds__(kThreads, PanelTile::kBlocks)
    panel_kernel(const Cholesky p, int64_t c, int width) {
  DISTAYA_DYNAMIC_SHARED(float, shared);
  ptx::wait_for_earlier();
  ptx::let_later_start();
  float* X = p.H + c;
  const Gemm g{c, width, width, 1, X, p.n, 1, p.work, 1, kBlock, X, p.n, false, true};
  const TileProduct<PanelTile, true, true> tile(
      g, static_cast<int64_t>(blockIdx.x) * PanelTile::kRows, 0, shared);
  tile.store<false>(g);
}

__global__ void __launch_bounds__(kThreads) clear_lower_kernel(float* H, int64_t n) {
  ptx::wait_for_earlier();
  for (int64_t i = blockIdx.x; i < n; i += gridDim.x)
    for (int64_t j = threadIdx.x; j < i; j += kThreads) H[i * n + j] = 0;
}

template <class Shape>
void start(const Cholesky& p, const Step& s, cudaStream_t stream) {
  constexpr int kTiles = TileProduct<Shape, true, true>::kShared, kOwn = sizeof(Diagonal);
  constexpr int kShared = kTiles > kOwn ? kTiles : kOwn;
  static_assert(kShared <= 99 * 1024, "more than sm_86 and sm_120 have");
  need_shared(step_kernel<Shape>, kShared);
  launch<true>(step_kernel<Shape>, grid_of(1 + s.tiles(Shape::kRows)), kThreads, kShared, stream, p,
               s);
}

void step(const Cholesky& p, const Step& s, cudaStream_t stream) {
  if (large_pays(1 + s.tiles(LargeTile::kRows), 1 + s.tiles(SmallTile::kRows)))
    return start<LargeTile>(p, s, stream);
  start<SmallTile>(p, s, stream);
}

void panel(const Cholesky& p, int64_t c, int width, cudaStream_t stream) {
  constexpr int kShared = TileProduct<PanelTile, true, true>::kShared;
  need_shared(panel_kernel, kShared);
  launch<true>(panel_kernel, grid_of(ceil_div<int64_t>(c, PanelTile::kRows)), kThreads, kShared,
               stream, p, c, width);
}

}  // namespace

int64_t cholesky_work_cuda(int64_t) { return kBlock * kBlock; }  // a diagonal block's inverse

void cholesky_cuda(const Cholesky& p, Stream s, int device) {
  const DeviceGuard guard(device);
  const cudaStream_t stream = raw(s);
  launch(prepare_kernel, 1, kThreads, 0, stream, p);
  if (p.n == 0) return;
  int64_t c = start_of(p.n, kBlock);
  step(p, {0, 0, c, static_cast<int>(p.n - c)}, stream);
  Triangle later;  // what the slice before has left over
  for (int64_t end = p.n, last = p.n; c > 0; last = c, c -= kBlock) {
    panel(p, c, static_cast<int>(last - c), stream);
    Step s{c, last - c, c - kBlock, kBlock, later};
    later = {};
    if (c % kSlice == 0) {  // this block completes its slice
      s.k = end - c, end = c;
      // The next slice's columns are waited for. Of the rest, 0.7^2 is about half.
      const int64_t half = (c - kSlice) * 7 / 10 / kBlock * kBlock;
      s.rest = {s.from, s.k, half, s.next};
      later = {s.from, s.k, 0, half};
    }
    step(p, s, stream);
  }
  launch<true>(clear_lower_kernel, grid_of(p.n, 65535), kThreads, 0, stream, p.H, p.n);
}

}  // namespace distaya
