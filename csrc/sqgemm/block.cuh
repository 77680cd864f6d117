// What a block does around its multiplications: its share of the work, activations in, sums out.
#pragma once

#include "core/ptx.cuh"
#include "sqgemm/epilogue.cuh"
#include "sqgemm/plan.cuh"
#include "sqgemm/tile.cuh"

namespace distaya::sqgemm {

// One launch. Activations are 16-bit, [parts][tokens][x_stride], zero behind the last column.
struct Launch {
  Plan plan;
  Output out;
  pack::Format format;
  const uint8_t* weights[2];
  const void* x;
  int64_t x_stride;
  int device;
  float* partial;  // [splits][matrices][tokens][padded rows]
};

// What a warp works on; kept in shared memory, because the sums want the registers.
struct Task {
  const uint8_t* weights;
  int64_t token;
  int row_tile, first_tile, end_tile, way, steps;
};

__device__ inline Task task_of(const Launch& p) {
  const Plan& plan = p.plan;
  const int warp = threadIdx.x / 32;
  const int64_t block = blockIdx.x;  // passes of one row block side by side share it in the L2
  const int64_t row_way = warp / plan.matrices % plan.row_ways, last = p.format.row_tiles() - 1;
  const int64_t row_tile = block / plan.passes * plan.row_ways + row_way;
  const int64_t first = blockIdx.y * plan.split_tiles, end = first + plan.split_tiles;
  Task w;
  w.weights = p.weights[warp % plan.matrices];
  w.token = block % plan.passes * plan.n_tiles * 8;
  w.row_tile = static_cast<int>(row_tile < last ? row_tile : last);  // behind the end: unseen
  w.first_tile = static_cast<int>(first);
  w.end_tile = static_cast<int>(end < p.format.col_tiles() ? end : p.format.col_tiles());
  w.way = warp / plan.matrices / plan.row_ways;
  w.steps = cuda::ceil_div(w.end_tile - w.first_tile, plan.ways);
  return w;
}

// One warp fetches a record to the L2 cache: all that may be done with weights before the kernels
// ahead have ended, for one of them may have written them. Of int4_mask that is nothing, as its
// offsets would have to be read.
__device__ inline void prefetch_record(const Launch& p, const Task& w, int tile) {
  const int bytes = 16 * p.plan.chunks;
  const uint8_t* from = w.weights + (w.row_tile * p.format.col_tiles() + tile) * bytes;
  for (int at = 128 * (threadIdx.x % 32); at < bytes; at += 128 * 32) ptx::prefetch(from + at);
}

// One warp starts copying a record.
__device__ inline void stage_record(const Launch& p, const Task& w, int tile, uint8_t* to) {
  const Plan& plan = p.plan;
  const Kind kind = p.format.kind;
  const int64_t number = w.row_tile * p.format.col_tiles() + tile;
  int64_t begin = number * plan.chunks * 16;
  int chunks = plan.chunks;
  if (kind == Kind::int4_mask) {
    const auto* offsets = reinterpret_cast<const int64_t*>(w.weights) + number;
    begin = offsets[0];
    chunks = static_cast<int>(offsets[1] - begin) / 16;
  }
  const bool lines = kind == Kind::int4 || kind == Kind::int8 || kind == Kind::int4_24;
  copy_record<32>(w.weights + begin, plan.head, chunks - plan.head, lines, plan.body_at, to,
                  threadIdx.x % 32);
}

// All threads start copying the activations of a step: [ways][parts][n_tiles * 8][128]. A thread
// has one chunk of every eighth token.
template <int n_tiles, int parts>
__device__ void stage_activations(const Launch& p, const Task& w, int tile, uint8_t* to) {
  constexpr int kChunks = pack::kTileCols / 8, kBytes = pack::kTileCols * 2;
  const int chunk = threadIdx.x % kChunks, row = threadIdx.x / kChunks;
  static_assert(kThreads / kChunks == 8);
  const int64_t token = w.token + row;
  to += kBytes * row + 16 * shuffled_chunk(row, chunk);
  const auto* x = static_cast<const uint16_t*>(p.x);
#pragma unroll 1
  for (int way = 0; way < p.plan.ways; ++way, ++tile) {
    const int64_t last = tile < w.end_tile ? p.out.tokens : 0;
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      const uint16_t* from = x + (part * p.out.tokens + token) * p.x_stride +
                             int64_t{tile} * pack::kTileCols + chunk * 8;
#pragma unroll 2
      for (int n = 0; n < n_tiles; ++n, to += 8 * kBytes, from += 8 * p.x_stride) {
        const bool there = token + 8 * n < last;
        ptx::copy_async_or_zero(to, there ? from : x, there);
      }
    }
  }
}

// Every warp's sums to shared memory as [warp][token][kPitch].
template <int n_tiles>
__device__ void share_sums(const float (&sum)[4][n_tiles][4], float* to) {
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  float* mine = to + threadIdx.x / 32 * n_tiles * 8 * kPitch;
#pragma unroll
  for (int n = 0; n < n_tiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int token = 8 * n + 2 * c + e % 2, row = e / 2 * 32 + 4 * g;
      *reinterpret_cast<float4*>(mine + token * kPitch + row) =
          make_float4(sum[0][n][e], sum[1][n][e], sum[2][n][e], sum[3][n][e]);
    }
}

// Adds the warps that shared a row's columns, in their order, and writes y or the partial sums.
template <class T>
__device__ void write_sums(const Launch& p, const float* sums) {
  const Plan& plan = p.plan;
  const int tokens = plan.n_tiles * 8, per_tile = tokens * pack::kTileRows;
  const int64_t block = blockIdx.x, first_token = block % plan.passes * tokens;
  const int64_t padded = p.format.row_tiles() * pack::kTileRows;
  for (int i = threadIdx.x; i < plan.row_ways * per_tile; i += kThreads) {
    const int row_way = i / per_tile, t = i % per_tile / pack::kTileRows;
    const int64_t token = first_token + t;
    const int64_t row =
        (block / plan.passes * plan.row_ways + row_way) * pack::kTileRows + i % pack::kTileRows;
    if (token >= p.out.tokens || row >= p.out.rows) continue;
    const auto total = [&](int m) {
      float sum = 0.f;
      for (int way = 0; way < plan.ways; ++way) {
        const int warp = (way * plan.row_ways + row_way) * plan.matrices + m;
        sum += sums[(warp * tokens + t) * kPitch + i % pack::kTileRows];
      }
      return sum;
    };
    if (plan.splits == 1) {
      finish<T>(p.out, token, row, total(0), p.out.glu ? total(1) : 0.f);
      continue;
    }
    for (int m = 0; m < plan.matrices; ++m) {
      const int64_t part = static_cast<int64_t>(blockIdx.y) * plan.matrices + m;
      p.partial[(part * p.out.tokens + token) * padded + row] = total(m);
    }
  }
}

}  // namespace distaya::sqgemm
