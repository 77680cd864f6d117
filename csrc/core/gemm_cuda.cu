// Chooses the tile and the directions in which the operands are read.
#include "core/gemm.cuh"
#include "core/gemm_grid.cuh"

namespace distaya::cuda {
namespace {

template <class Shape, bool a_along_k, bool b_along_k>
__global__ void __launch_bounds__(kGemmThreads, Shape::kBlocks)
    gemm_kernel(const Gemm g, int64_t tiles_m, int64_t tiles_n) {
  DISTAYA_DYNAMIC_SHARED(float, shared);
  // Where tiles differ in work, the last are the longest: they start first.
  const int64_t t = g.upper_only ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  int64_t i, j;
  place_of_tile(t, tiles_m, tiles_n, g.upper_only, i, j);
  const TileProduct<Shape, a_along_k, b_along_k> tile(g, i * Shape::kRows, j * Shape::kCols,
                                                      shared);
  tile.store(g);
}

template <class Shape, bool a_along_k, bool b_along_k>
void start(const Gemm& g, cudaStream_t stream) {
  const auto kernel = &gemm_kernel<Shape, a_along_k, b_along_k>;
  constexpr int kShared = TileProduct<Shape, a_along_k, b_along_k>::kShared;
  const int64_t tiles_m = ceil_div<int64_t>(g.m, Shape::kRows),
                tiles_n = ceil_div<int64_t>(g.n, Shape::kCols),
                tiles = tiles_of(tiles_m, tiles_n, g.upper_only);
  check(tiles <= int64_t{1} << 30, "gemm of ", g.m, " x ", g.n, " exceeds the CUDA grid");
  need_shared(kernel, kShared);
  launch(kernel, grid_of(tiles), kGemmThreads, kShared, stream, g, tiles_m, tiles_n);
}

template <class Shape>
void start(const Gemm& g, cudaStream_t stream) {
  const bool a_along_k = g.a_col == 1, b_along_k = g.b_row == 1;
  if (a_along_k && b_along_k) return start<Shape, true, true>(g, stream);
  if (a_along_k) return start<Shape, true, false>(g, stream);
  if (b_along_k) return start<Shape, false, true>(g, stream);
  start<Shape, false, false>(g, stream);
}

}  // namespace

void gemm(const Gemm& g, cudaStream_t stream) {
  if (g.m <= 0 || g.n <= 0 || g.k <= 0) return;
  check(g.k < int64_t{1} << 31, "gemm over ", g.k, " products exceeds 2^31");
  // Sums over k are split differently in the two tiles, so rows of one product must agree on it.
  if (large_tiles(g.m_all ? g.m_all : g.m, g.n, g.upper_only)) return start<LargeTile>(g, stream);
  start<SmallTile>(g, stream);
}

}  // namespace distaya::cuda
