// How a product is cut into thread blocks. Sizes alone decide, never the device: the same call
// gives the same bits on every GPU of one architecture.
#pragma once

#include "core/cuda.cuh"
#include "sqgemm/sqgemm.h"

namespace distaya::sqgemm {

inline constexpr int kWarps = 4;
inline constexpr int kThreads = kWarps * 32;
inline constexpr int kMostShared = 99 * 1024;  // of a block on sm_86, sm_89 and sm_120
inline constexpr int kEnoughBlocks = 512;      // about four for each multiprocessor of a large GPU
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
  int expanded_at;  // int4 words each warp makes of a mask, n:m or int3 record, or 0
  int grid_at;      // scales and zeros of whole rows, or 0
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

inline Plan make_plan(const pack::Format& f, int64_t tokens, Dtype dtype, bool glu) {
  Plan p{};
  p.parts = dtype == Dtype::f32 ? 3 : 1;
  p.matrices = glu ? 2 : 1;
  const int most = p.parts == 3 ? 2 : 8;
  p.n_tiles = 1;
  while (p.n_tiles < most && p.n_tiles * 8 < tokens) p.n_tiles *= 2;
  for (;; p.n_tiles /= 2) {  // few tokens: the warps share the columns; many: the activations
    const int shared = p.n_tiles * p.parts <= 2 ? kWarps : p.matrices;
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
  int64_t splits = cuda::ceil_div<int64_t>(kEnoughBlocks, p.passes * p.row_blocks);
  if (splits > steps / 2) splits = steps / 2;  // shorter ones would only fill the pipeline
  if (splits > kMostSplits) splits = kMostSplits;
  if (splits < 1) splits = 1;
  p.split_tiles = steps > 0 ? cuda::ceil_div<int64_t>(steps, splits) * p.ways : p.ways;
  p.splits = steps > 0 ? cuda::ceil_div<int64_t>(f.col_tiles(), p.split_tiles) : 1;
  p.x_bytes =
      cuda::ceil_div<int64_t>(p.parts * tokens * f.col_tiles() * pack::kTileCols * 2, 256) * 256;
  if (p.splits > 1)
    p.partial_bytes = p.splits * p.matrices * tokens * f.row_tiles() * pack::kTileRows * 4;
  return p;
}

}  // namespace distaya::sqgemm
