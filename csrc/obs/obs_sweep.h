// Textual part of obs_cpu.cpp: the column loop of one block for one panel of kNR rows.
//
// A column is visited once: g replaces it in T. Columns of the register tile it belongs to are
// updated at once; the others lag behind and are brought up to date, tile by tile, by the same
// microkernel as the panel GEMM (T[tile] -= N[done, tile]^T g[done]) just before they are needed.

inline constexpr int64_t kTiles = (kObsBlock + kMR - 1) / kMR;
inline constexpr int64_t kHeight = kTiles * kMR;  // of a transposed tile: whole register tiles

// What the panels of a block share.
struct Block {
  int64_t i1, cols;                               // first column and width
  int64_t tiles;                                  // register tiles that cover it
  const float* P;                                 // [tiles][i1][kMR]: P_b[k][tile * kMR + c]
  alignas(64) float N[kTiles * kObsBlock * kMR];  // [tile][k][kMR]: -N_b likewise
  alignas(64) float D[kObsBlock];
};

// One thread's tiles.
struct Panel {
  int64_t rows, row0;  // rows of W that are real, first of them
  float* T;            // [tiles * kMR][kNR] entry weights, then g
  float* E;            // [cols][kNR] of this block: W0 in, E out
  alignas(64) float Q[kObsBlock * kNR];
  alignas(64) uint8_t keep[kObsBlock * kNR];
  alignas(64) uint8_t codes[kObsBlock * kNR];
  alignas(64) float loss[kNR];
  Grids grids;
  int64_t done[kTiles];  // updates applied to each tile
};

// Applies the updates of columns [done, j) to tile t.
DISTAYA_INLINE void bring(const Block& b, Panel& x, int64_t t, int64_t j) {
  const int64_t from = x.done[t];
  if (from < j)
    microkernel(j - from, b.N + (t * kObsBlock + from) * kMR, x.T + from * kNR, x.T + t * kMR * kNR,
                kNR);
  x.done[t] = std::max(from, j);
}

// Makes the tiles after j's own that hold columns < end current, as seen from column j.
inline void look_ahead(const Block& b, Panel& x, int64_t j, int64_t end) {
  for (int64_t t = j / kMR + 1; t * kMR < std::min(end, b.cols); ++t) bring(b, x, t, j);
}

inline void start_nm_group(const Obs& p, const Block& b, Panel& x, int64_t j) {
  const int64_t m = std::min(p.m, b.cols - j), drop = std::max<int64_t>(0, m - p.n);
  look_ahead(b, x, j, j + m);
  const float *T = x.T + j * kNR, *D = b.D + j;
  uint8_t* keep = x.keep + j * kNR;
  if (m == 4) return choose_nm<4>(T, D, m, drop, keep);
  if (m == 8) return choose_nm<8>(T, D, m, drop, keep);
  choose_nm<0>(T, D, m, drop, keep);
}

// The grid of column j, which starts a group of its own.
inline void start_grid(const Obs& p, const Block& b, Panel& x, int64_t j) {
  const int64_t column = b.i1 + j;
  const int64_t group = p.group_of ? p.group_of[column] : column / p.group;
  const int64_t at = x.row0 * p.groups + group;
  if (!p.dynamic || p.reference)  // given, or made on entry to the block
    return read_grids(p.scales + at, p.zeros + at, p.groups, x.rows, x.grids);
  const int64_t n = std::min(p.group, b.cols - j);
  look_ahead(b, x, j, j + n);
  make_grids(p.grid, x.T + j * kNR, n, x.grids);
  write_grids(x.grids, x.rows, p.groups, p.scales + at, p.zeros + at);
}

// As published: the grids of all groups of a block from its entry weights.
inline void make_entry_grids(const Obs& p, const Block& b, Panel& x) {
  for (int64_t j = 0; j < b.cols; j += p.group) {
    const int64_t at = x.row0 * p.groups + (b.i1 + j) / p.group;
    make_grids(p.grid, x.T + j * kNR, std::min(p.group, b.cols - j), x.grids);
    write_grids(x.grids, x.rows, p.groups, p.scales + at, p.zeros + at);
  }
}

DISTAYA_INLINE bool starts_grid(const Obs& p, int64_t column) {
  if (p.group_of) return column == 0 || p.group_of[column] != p.group_of[column - 1];
  return column % p.group == 0;
}

// Columns [j, end) of one tile whose masks and grids are known; the tile ends at tile_end.
template <bool masked, bool rounded>
DISTAYA_INLINE void sweep_columns(const Obs& p, const Block& b, Panel& x, int64_t j, int64_t end,
                                  int64_t tile_end) {
  const int64_t t = j / kMR;
  const float* N = b.N + t * kObsBlock * kMR - t * kMR;  // N[k * kMR + column]
  const vf top = splat(static_cast<float>((1 << p.grid.bits) - 1));
  for (int64_t v = 0; v < kNR; v += kLanes) {
    vf loss = load(x.loss + v);
    const vf scale = load(x.grids.scale + v), zero = load(x.grids.zero + v);
    for (int64_t k = j; k < end; ++k) {
      const int64_t at = k * kNR + v;
      const vf w = load(x.T + at);
      vf q = w;
      if constexpr (masked) q = select(load(x.keep + at) != vf{}, w, vf{});
      if constexpr (rounded) {
        const vf code = code_of(q, scale, zero, top);
        store(x.codes + at, code);
        q = scale * (code - zero);
      }
      const vf g = w - q;
      loss = fma(g * g, splat(b.D[k]), loss);
      store(x.T + at, g);
      store(x.Q + at, q);
      store(x.E + at, load(x.E + at) - q);
      for (int64_t c = k + 1; c < tile_end; ++c)
        store(x.T + c * kNR + v, fma(splat(N[k * kMR + c]), g, load(x.T + c * kNR + v)));
    }
    store(x.loss + v, loss);
  }
}

// The whole block: x.T holds the entry weights and, unless N:M chooses here, x.keep the mask.
template <bool masked, bool rounded>
void sweep_block(const Obs& p, const Block& b, Panel& x) {
  std::fill(x.done, x.done + kTiles, int64_t{0});
  std::memset(x.loss, 0, sizeof x.loss);
  if (rounded && p.dynamic && p.reference) make_entry_grids(p, b, x);
  // Tells that a whole-row grid, or one that spans blocks, is still to be read.
  if (rounded && !starts_grid(p, b.i1)) start_grid(p, b, x, 0);
  for (int64_t t = 0; t < b.tiles; ++t) {
    bring(b, x, t, t * kMR);
    const int64_t tile_end = std::min((t + 1) * kMR, b.cols);
    for (int64_t j = t * kMR; j < tile_end;) {
      const auto chooses = [&](int64_t k) { return p.select == Select::nm && k % p.m == 0; };
      const auto rounds = [&](int64_t k) { return rounded && starts_grid(p, b.i1 + k); };
      if (chooses(j)) start_nm_group(p, b, x, j);
      if (rounds(j)) start_grid(p, b, x, j);
      int64_t end = j + 1;
      while (end < tile_end && !chooses(end) && !rounds(end)) ++end;
      sweep_columns<masked, rounded>(p, b, x, j, end, tile_end);
      j = end;
    }
  }
}
