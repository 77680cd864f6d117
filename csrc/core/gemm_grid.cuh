// Which tile of a product a thread block has, and which size of tile is better.
#pragma once

#include "core/gemm_tile.cuh"

namespace distaya::cuda {

// Tile number t of tiles_m x tiles_n, the shorter direction first, so that the operand that is
// longer there is read once and the other stays in the L2 cache. upper: only tiles on and above the
// diagonal, column by column.
__device__ inline void place_of_tile(int64_t t, int64_t tiles_m, int64_t tiles_n, bool upper,
                                     int64_t& i, int64_t& j) {
  if (!upper) {
    if (tiles_n <= tiles_m) {
      i = t / tiles_n, j = t % tiles_n;
    } else {
      i = t % tiles_m, j = t / tiles_m;
    }
    return;
  }
  const int64_t triangle = tiles_m * (tiles_m + 1) / 2;
  if (t >= triangle) {  // columns as high as the matrix
    i = (t - triangle) % tiles_m, j = tiles_m + (t - triangle) / tiles_m;
    return;
  }
  j = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(t) + 1.0) - 1.0) / 2);
  while (j * (j + 1) / 2 > t) --j;
  while ((j + 1) * (j + 2) / 2 <= t) ++j;
  i = t - j * (j + 1) / 2;
}

inline int64_t tiles_of(int64_t tiles_m, int64_t tiles_n, bool upper) {
  if (!upper) return tiles_m * tiles_n;
  const int64_t square = tiles_m < tiles_n ? tiles_m : tiles_n;
  return square * (square + 1) / 2 + (tiles_n - square) * tiles_m;
}

// Whether so many large tiles beat so many small ones: rounds of 132 multiprocessors (an H100's; a
// constant, so that results do not depend on the device) times the work of a tile, the small one
// taken to be 1.25 times as slow for its size, since it moves twice the bytes per product.
inline bool large_pays(int64_t large, int64_t small) {
  return 4 * 4 * ceil_div<int64_t>(large, 132) <= 5 * ceil_div<int64_t>(small, 132);
}

inline bool large_tiles(int64_t m, int64_t n, bool upper) {
  const auto tiles = [&](int64_t side) {
    return tiles_of(ceil_div(m, side), ceil_div(n, side), upper);
  };
  return large_pays(tiles(LargeTile::kRows), tiles(SmallTile::kRows));
}

}  // namespace distaya::cuda
