// Which part of H, or of a cross moment, a block of the tensor-core SYRK (syrk.cuh) computes.
#pragma once

#include "core/dtype.h"

namespace distaya::syrk {

constexpr int kPanel = 128;  // channels: H is cut into squares of one panel by another
constexpr int kGroup = 16;   // columns of squares walked together: 132 blocks share 33 panels of X

// Two squares of H: the rows are panel[0] and panel[1], their columns panel[columns[0]] and
// panel[columns[1]]. -1: no such panel, so fewer to load, or no second square. Of a cross moment
// panel[0] and panel[1] are Y's and panel[2] is X's.
struct Tile {
  int panel[3];
  int columns[2];
};

// Squares (2r, j) and (2r + 1, j), j > 2r, of which the second may lie on the diagonal.
DISTAYA_HD constexpr Tile pair_of(int64_t r, int64_t j) {
  const int top = static_cast<int>(2 * r), column = static_cast<int>(j);
  if (column == top + 1) return {{top, top + 1, -1}, {1, 1}};
  return {{top, top + 1, column}, {2, 2}};
}

constexpr int64_t tiles(int64_t panels) {
  return panels / 2 * (panels - panels / 2) + (panels + 3) / 4;
}

// The k-th tile: every square of the upper triangle is in exactly one. After all pairs come the
// diagonal squares they leave over, those of even panels, two to a tile; so 4096 columns make 264
// tiles, twice 132 SMs, and 14336 make 3164, 23.97 times.
DISTAYA_HD constexpr Tile tile_of(int64_t k, int panels) {
  for (int first = 1; first < panels; first += kGroup) {
    const int end = panels - first < kGroup ? panels : first + kGroup;
    const int whole = (first + 1) / 2;  // pairs of rows that need every column of the group
    const int64_t many = static_cast<int64_t>(whole) * (end - first);
    if (k < many) return pair_of(k / (end - first), first + k % (end - first));
    k -= many;
    for (int r = whole; 2 * r + 1 < end; k -= end - (2 * r + 1), ++r)
      if (k < end - (2 * r + 1)) return pair_of(r, 2 * r + 1 + k);
  }
  const int top = static_cast<int>(4 * k);
  return {{top, top + 2 < panels ? top + 2 : -1, -1}, {0, 1}};
}

// The same for all squares of a cross moment, of `rows` panels of Y and `panels` of X: squares
// (2r, j) and (2r + 1, j) of every r and j, in groups of columns likewise; 4096 columns of both
// make 512 tiles, and 14336 of X 1792.
constexpr int64_t cross_tiles(int64_t rows, int64_t panels) { return (rows + 1) / 2 * panels; }

DISTAYA_HD constexpr Tile cross_tile_of(int64_t k, int rows, int panels) {
  const int64_t pairs = (rows + 1) / 2;
  const int first = static_cast<int>(k / (pairs * kGroup)) * kGroup;
  const int wide = panels - first < kGroup ? panels - first : kGroup;
  k -= pairs * first;
  const int top = static_cast<int>(2 * (k / wide)), column = first + static_cast<int>(k % wide);
  return {{top, top + 1 < rows ? top + 1 : -1, column}, {2, 2}};
}

}  // namespace distaya::syrk
