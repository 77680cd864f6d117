// Textual part of sqgemm_cpu.cpp: 64 rows times many tokens. A tile is decoded once into a panel in
// L1, which all tokens are then multiplied with, a register tile of them at a time.

// Scales and zeros of a tile, [groups][64].
struct Grid {
  alignas(64) float scales[4 * kTileRows], zeros[4 * kTileRows];
  int groups;
};

// A core reaches the bandwidth of the memory only if it asks early and evenly, across the 4 KB
// pages where the hardware's prefetcher gives up: while a tile is multiplied, the record kAhead
// tiles on is asked for, its scales and zeros at once, its body (at, bytes) in steps.
struct Ahead {
  static constexpr int64_t kAhead = 2;
  const uint8_t* at;
  int64_t bytes;
};

DISTAYA_INLINE Ahead ahead(const Format& f, const uint8_t* buffer, int64_t tile) {
  const int64_t last = f.tiles(), a = std::min(last, tile + Ahead::kAhead);
  const int64_t from = pack::record_at(f, buffer, 0, a) + f.body_at();
  const int64_t end = pack::record_at(f, buffer, 0, std::min(last, a + 1));
  for (int i = 0; i < f.body_at(); i += 64) __builtin_prefetch(buffer + from - f.body_at() + i);
  return {buffer + from, std::max<int64_t>(0, end - from)};
}

#if DISTAYA_LANES == 16
#include "sqgemm/dot_avx512.h"
#else
#include "sqgemm/dot_words.h"
#endif

template <Kind kind>
void gemm(const Format& f, const uint8_t* buffer, int64_t row_tile, const Quantized& x, int64_t t0,
          int64_t t1, float* C) {
  alignas(64) uint8_t panel[pack::kTileWeights];
  Grid grid;
  const int groups = grid.groups = std::max(1, f.tile_groups());
  std::memset(C, 0, sizeof(float) * static_cast<size_t>((t1 - t0) * kTileRows));
  const int64_t blocks = (t1 - t0 + kTogether - 1) / kTogether;
  for (int64_t c = 0; c < x.col_tiles; ++c) {
    const Ahead next = ahead(f, buffer, row_tile * x.col_tiles + c);
    decode<kind, false>(f, buffer, row_tile, c, panel);
    tile_grid(f, buffer, row_tile, c, grid.scales, grid.zeros);
    for (int64_t b = 0; b < blocks; ++b) {  // sizes differ by at most one
      const int64_t t = t0 + b * (t1 - t0) / blocks, n = t0 + (b + 1) * (t1 - t0) / blocks - t;
      const int64_t at = c * x.tokens + t;
      multiply_tokens<kind>(n, panel, grid, x.values.get() + at * kTileCols,
                            x.sums.get() + at * groups, x.scales.get() + at * groups,
                            {next.at + b * next.bytes / blocks, next.bytes / blocks},
                            C + (t - t0) * kTileRows);
    }
  }
}
