// How a product is cut into thread blocks. Sizes alone decide, never the device: the same call
// gives the same bits on every GPU of one architecture.
#pragma once

#include <algorithm>
#include <cmath>

#include "core/cuda.cuh"
#include "sqgemm/sqgemm.h"

namespace distaya::sqgemm {

inline constexpr int kWarps = 4;
inline constexpr int kThreads = kWarps * 32;
// Dynamic shared memory: sm_86, sm_89 and sm_120 have 99 KB a block, and the kernel's own variables
// take the first of them, since dynamic memory begins at a multiple of 1024.
inline constexpr int kOwnShared = 1024;
inline constexpr int kMostShared = 99 * 1024 - kOwnShared;
inline constexpr int kMostSplits = 16;
inline constexpr int kPitch = 68;  // floats of a token in the sum of warps: 64 rows, then padding

// A block computes row_ways row tiles for one pass of tokens, over the columns of one split. Each
// of its four warps has one tile at a time: one of `matrices` (gate and up), row_ways, and `ways`
// neighbouring column tiles. A step of a block is `ways` column tiles.
struct Plan {
  int n_tiles;  // groups of 8 tokens in a pass: 1, 2, 4 or 8
  int parts;    // 16-bit terms of an activation: 3 of bf16 for float32
  int matrices, ways, row_ways;
  int64_t passes, row_blocks, splits, split_tiles;
  // Shared memory: `stages` of {a record of each warp, activations}, then what the warps keep.
  int stages, body_at, record_bytes, stage_bytes;
  int head, chunks;  // of 16 bytes of a packed record: before its body; in all, 0 where they differ
  int expanded_at;   // int4 words each warp makes of a mask, n:m or int3 record, or 0
  int grid_at;       // scales and zeros of whole rows, or 0
  int shared_bytes;
  int64_t x_bytes, partial_bytes;  // of Problem.work
};

inline bool is_expanded(pack::Kind kind) {
  return kind == pack::Kind::int3 || kind == pack::Kind::int4_mask || kind == pack::Kind::int4_out;
}

constexpr int round_up(int n, int step) { return (n + step - 1) / step * step; }

// Fills in the shared memory of a plan; false where it does not fit.
inline bool lay_out(Plan& p, const pack::Format& f) {
  const int most_values = pack::kTileWeights / 2;  // of int4_mask
  const int body =
      f.kind == pack::Kind::int4_mask ? pack::kMaskBytes + most_values : f.body_bytes();
  p.head = f.body_at() / 16;
  p.chunks = f.kind == pack::Kind::int4_mask ? 0 : static_cast<int>(f.record_bytes() / 16);
  p.body_at = round_up(f.body_at(), 128);
  p.record_bytes = round_up(p.body_at + body, 128);
  p.stage_bytes = kWarps * p.record_bytes + p.ways * p.parts * p.n_tiles * 8 * pack::kTileCols * 2;
  int kept = 0;
  const auto keep = [&](bool wanted, int bytes) {
    const int at = kept;
    if (wanted) kept += kWarps * bytes;
    return at;
  };
  const int expanded = keep(is_expanded(f.kind), pack::kTileWeights / 2);
  const int grid = keep(f.group == 0, pack::kTileRows * (4 + 1));
  p.stages = 3 * p.stage_bytes + kept <= kMostShared ? 3 : 2;
  p.expanded_at = p.stages * p.stage_bytes + expanded;
  p.grid_at = p.stages * p.stage_bytes + grid;
  const int sums = kWarps * p.n_tiles * 8 * kPitch * 4;
  p.shared_bytes = p.stages * p.stage_bytes + kept;
  if (p.shared_bytes < sums) p.shared_bytes = sums;
  return p.shared_bytes <= kMostShared;
}

// Blocks that a multiprocessor should hold: three where 168 registers a thread suffice.
constexpr int resident_blocks(int groups, bool bytes) { return groups == 1 && !bytes ? 3 : 2; }

// Splits of the columns, by a count for an H100 of 132 multiprocessors. Unit: what a step takes
// when blocks fill them all and share the memory's bandwidth. A remainder of blocks runs faster the
// fewer they are, but only so far: at 0.4 of that (about a block for each multiprocessor, 34 KB on
// their way) where the memory is the limit, at 0.75 where a lone block waits for its own
// multiplications. Half a step to begin; a second kernel costs one, and its sums n_tiles * row_ways
// * 2 KB a block, out and in through the L2, against 17 KB from memory in a step.
inline int64_t best_splits(const Plan& p, int64_t steps, bool bytes) {
  const int64_t blocks = p.passes * p.row_blocks;
  const int groups = p.n_tiles * p.parts;
  const double slots = 132.0 * resident_blocks(groups, bytes), least = groups <= 2 ? 0.4 : 0.75;
  int64_t best = 1;
  double lowest = 0;
  for (int64_t splits = 1; splits <= kMostSplits && (splits == 1 || 2 * splits <= steps);
       ++splits) {
    const double waves = static_cast<double>(blocks * splits) / slots, whole = std::floor(waves);
    const double rest = waves > whole ? std::max(waves - whole, least) : 0;
    const auto each = static_cast<double>(cuda::ceil_div(steps, splits));
    const double sums = splits == 1 ? 0 : 1 + waves * p.n_tiles * p.row_ways / 8;
    const double cost = (whole + rest) * (each + 0.5) + sums;
    if (splits == 1 || cost < lowest) lowest = cost, best = splits;
  }
  return best;
}

inline Plan make_plan(const pack::Format& f, int64_t tokens, Dtype dtype, bool glu) {
  Plan p{};
  p.parts = dtype == Dtype::f32 ? 3 : 1;
  p.matrices = glu ? 2 : 1;
  const int most = p.parts == 3 ? 2 : 8;
  p.n_tiles = 1;
  while (p.n_tiles < most && p.n_tiles * 8 < tokens) p.n_tiles *= 2;
  // Few tokens: the warps share the columns. Many: the activations, which every block reads. With 8
  // tokens those are 8 KB for 17 KB of int4 in a step of four column tiles, with 16 tokens as much
  // in a step of two; 16 KB would be more than the L2 gives beside the weights.
  for (;; p.n_tiles /= 2) {
    const int groups = p.n_tiles * p.parts;
    const int shared = groups == 1 ? kWarps : groups == 2 ? 2 * p.matrices : p.matrices;
    p.ways = shared / p.matrices;
    p.row_ways = kWarps / shared;
    if (lay_out(p, f)) break;
    p.ways = 1;
    p.row_ways = kWarps / p.matrices;
    if (lay_out(p, f) || p.n_tiles == 1) break;  // one group of tokens always fits
  }
  p.passes = cuda::ceil_div<int64_t>(tokens, p.n_tiles * 8);
  p.row_blocks = cuda::ceil_div<int64_t>(f.row_tiles(), p.row_ways);
  const int64_t steps = cuda::ceil_div<int64_t>(f.col_tiles(), p.ways);
  const int64_t splits = best_splits(p, steps, f.kind == pack::Kind::int8);
  p.split_tiles = steps > 0 ? cuda::ceil_div<int64_t>(steps, splits) * p.ways : p.ways;
  p.splits = steps > 0 ? cuda::ceil_div<int64_t>(f.col_tiles(), p.split_tiles) : 1;
  p.x_bytes =
      cuda::ceil_div<int64_t>(p.parts * tokens * f.col_tiles() * pack::kTileCols * 2, 256) * 256;
  if (p.splits > 1)
    p.partial_bytes = p.splits * p.matrices * tokens * f.row_tiles() * pack::kTileRows * 4;
  return p;
}

}  // namespace distaya::sqgemm
