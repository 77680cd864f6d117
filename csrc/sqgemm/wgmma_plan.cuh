// How a product of many tokens is cut for the warpgroup kernel (wgmma.cuh). As in plan.cuh, sizes
// alone decide.
#pragma once

#include "core/cuda.cuh"
#include "sqgemm/sqgemm.h"

namespace distaya::sqgemm {

inline constexpr int kPairThreads = 256;          // two warpgroups
inline constexpr int kPairRows = 256;             // of a block: a pair of row tiles each
inline constexpr int kPairRecords = 4;            // row tiles of a block
inline constexpr int kPairShared = 227 * 1024;    // of a block on sm_90
inline constexpr int kPairPitch = kPairRows + 4;  // floats of a token in the shared sums
inline constexpr int kPairBlocks = 132;           // multiprocessors of an H100, one block on each

// Column tiles in shared memory: being multiplied, being left, and (the others) on their way.
constexpr int pair_stages(int n) { return n == 128 ? 4 : 6; }

struct PairPlan {
  int n;         // tokens of a pass, 64 or 128
  int matrices;  // 2: gate and up, a warpgroup each
  int64_t passes, row_blocks, splits, split_tiles;
  // A stage: activations [2 panels of 64 columns][n][64] of 16 bits, then the records.
  int body_at, record_bytes, stage_bytes;
  int grid_at;       // scales and zeros of whole rows
  int zeros_at;      // behind the scales
  int shift;         // column >> shift: its scale in the tile
  int head, chunks;  // 16-byte chunks of a record: before its body, and in all
  int shared_bytes;
  int64_t x_bytes, partial_bytes;  // of Problem.work
};

constexpr int rounded_to(int bytes, int step) { return (bytes + step - 1) / step * step; }

constexpr PairPlan pair_layout(const pack::Format& f, int n) {
  PairPlan p{};
  p.n = n;
  p.body_at = rounded_to(f.body_at(), 128);
  p.record_bytes = p.body_at + f.body_bytes();
  p.stage_bytes = rounded_to(n * pack::kTileCols * 2 + kPairRecords * p.record_bytes, 1024);
  p.grid_at = pair_stages(n) * p.stage_bytes;
  p.zeros_at = f.group ? f.zeros_at() : pack::kTileRows * f.scale_bytes();
  p.shift = f.group == 32 ? 5 : f.group == 64 ? 6 : 7;
  p.head = f.body_at() / 16;
  p.chunks = static_cast<int>(f.record_bytes() / 16);
  const int grid = f.group ? 0 : kPairRecords * pack::kTileRows * (f.scale_bytes() + 1);
  const int sums = n * kPairPitch * 4;
  p.shared_bytes = p.grid_at + grid > sums ? p.grid_at + grid : sums;
  return p;
}

constexpr bool pairs_fit() {
  for (const auto kind : {pack::Kind::int4, pack::Kind::int4_24})
    for (const int group : {0, 32, 64, 128})
      for (const int n : {64, 128})
        if (pair_layout({kind, 1, 1, group, false}, n).shared_bytes > kPairShared) return false;
  return true;
}

static_assert(pairs_fit());

// Splits of the columns. Counted in stages of a block: a wave of blocks takes its tiles and about 3
// more to begin and to end; sums through memory about 11 (writing 128 KB at some 30 bytes a cycle
// of a multiprocessor is 4 stages of 1024 cycles, reading them the same, a launch 3).
constexpr int64_t pair_splits(int64_t blocks, int64_t tiles) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t splits = 1; splits <= 16 && splits <= (tiles + 1) / 2; ++splits) {
    const int64_t each = (tiles + splits - 1) / splits;
    const int64_t waves = (blocks * splits + kPairBlocks - 1) / kPairBlocks;
    const int64_t cost = waves * (each + 3) + (splits > 1 ? 11 : 0);
    if (cost < least) least = cost, best = splits;
  }
  return best;
}

inline PairPlan make_pair_plan(const pack::Format& f, int64_t tokens, bool glu) {
  PairPlan p = pair_layout(f, tokens <= 64 ? 64 : 128);
  p.matrices = glu ? 2 : 1;
  p.passes = cuda::ceil_div<int64_t>(tokens, p.n);
  p.row_blocks = cuda::ceil_div<int64_t>(f.row_tiles() * p.matrices, kPairRecords);
  const int64_t tiles = f.col_tiles();
  p.split_tiles = tiles;
  p.splits = 1;
  if (tiles > 0) {
    const int64_t splits = pair_splits(p.row_blocks * p.passes, tiles);
    p.split_tiles = cuda::ceil_div<int64_t>(tiles, splits);
    p.splits = cuda::ceil_div<int64_t>(tiles, p.split_tiles);
  }
  p.x_bytes = p.passes * tiles * p.n * pack::kTileCols * 2;
  if (p.splits > 1)
    p.partial_bytes = p.splits * p.matrices * tokens * f.row_tiles() * pack::kTileRows * 4;
  return p;
}

}  // namespace distaya::sqgemm
