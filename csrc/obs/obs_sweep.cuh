// One block of 128 columns of the sweep in one launch. A thread is a row and a warp 32 of them; all
// of the row's 128 weights lie in shared memory as [column][row], where g replaces a column once it
// is visited. Work goes in tiles of 16 columns, which are in registers while they are worked on:
// a tile is first brought up to date with the columns visited before it, then its own columns
// follow one another. Warps never wait for each other; N_b is shared by all of a thread block.
//
// Counted (sm_90 code) for 32 rows, one warp: 448 steps of the update loop at 24 instructions, 16
// of them FMA; 128 columns at 30 besides their FMAs (7.5 on average) and loads of N (2); 25 a
// column to come in and 25 to leave: some 24 thousand issue slots. Aya's stack of 34816 rows is
// 1088 warps, 2.1 per scheduler of 132 SMs, so some 75 thousand cycles where three share a
// scheduler, and 63 MB of memory traffic. Issue slots bound it. The panel product before it
// has 1.8e10 flop, three times over, and 285 MB on average: it is the larger by 2 to 4. With 4096
// rows a warp has a scheduler to itself and is bound by latency: 128 dependent roundings of about
// 100 cycles and the update loop, some 30 thousand cycles.
#pragma once

#include "obs/obs_row.cuh"
#include "obs/obs_select.cuh"

namespace distaya {

// What one launch needs beside Obs.
struct Block {
  const float *N, *D;  // [kPacked], [width]
  const float* T;      // [rows, kB]
  bool entered;        // T holds the entry weights; else E P, to which W is still to be added
  float* E;            // [rows, e_pitch]
  int64_t e_pitch;
  int64_t i1;
  int width;
  const SelectState* cut;  // the threshold of an unstructured block; null: nothing goes
};

constexpr int kMostWarps = 9;                   // of a thread block: 288 rows
constexpr int kOutPitch = 34, kCodePitch = 36;  // of a tile on its way out, [16][32 rows]
constexpr int kOutWords = 16 * kOutPitch + 16 * kCodePitch / 4;

// Dynamic shared memory: N, then the rows, then each warp's tile on its way out.
constexpr int pitch_of(int warps) { return 32 * warps + 1; }  // odd: columns and rows spread banks

constexpr size_t sweep_shared(int warps) {
  return sizeof(float) *
         static_cast<size_t>(kPacked + 2 * kB + kB * pitch_of(warps) + warps * kOutWords);
}

// A warp's tile on its way to global memory, where lanes run along columns.
struct Out {
  float* q;       // [16][kOutPitch], column by column
  uint8_t* code;  // [16][kCodePitch]
};

// What visiting a column needs beside the row.
struct Visit {
  const float *N, *D;
  bool rounds, reads;  // reads: grids are given, those of this row at scales and zeros
  float top;
  const int* group;  // [width] which of them to read at this column, -1: none
  const float *scales, *zeros;
  float* q;  // this row's place in Out
  uint8_t* code;
};

// Visits columns from .. to - 1 of a tile whose masks and fitted grids are known; their loss.
__device__ inline float visit(const Visit& v, Row& row, int tile, int from, int to, Fitted& fit) {
  const unsigned gone = row.gone_of(tile);
  float x[kTileColumns], loss = 0.f;
  get_tile(row, tile, x);
  const int first = tile * kTileColumns;
  const float* N = v.N + tile_offset(tile) + first * kTileColumns;
#pragma unroll
  for (int c = 0; c < kTileColumns; ++c) {
    if (c < from || c >= to) continue;
    if (v.reads && v.group[first + c] >= 0) {
      fit.scale = v.scales[v.group[first + c]];
      fit.zero = v.zeros[v.group[first + c]];
    }
    const bool goes = gone >> c & 1u;
    float value = goes ? 0.f : x[c];
    if (v.rounds) {
      const float code = goes ? fit.zero : code_of(x[c], fit, v.top);
      value = fit.scale * (code - fit.zero);
      v.code[c * kCodePitch] = static_cast<uint8_t>(code);
    }
    v.q[c * kOutPitch] = value;
    const float g = x[c] - value;
    loss = fmaf(g * g, v.D[first + c], loss);
    x[c] = g;
    const auto* n = reinterpret_cast<const float4*>(N + c * kTileColumns);
#pragma unroll
    for (int i = (c + 1) / 4; i < kTileColumns / 4; ++i) {
      const float4 four = n[i];
      const float factor[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int l = 0; l < 4; ++l)
        if (4 * i + l > c) x[4 * i + l] = fmaf(-g, factor[l], x[4 * i + l]);
    }
  }
  put_tile(row, tile, from, x);
  return loss;
}

// E, W, the mask and the codes of a finished tile: half a warp to a row, so that each writes 16
// neighbouring columns.
template <class T>
__device__ inline void write_tile(const Obs& p, const Block& b, const Row& mine, int tile,
                                  int64_t row0, const Out& out) {
  const int lane = threadIdx.x % 32, c = lane % kTileColumns, j = tile * kTileColumns + c;
  const unsigned gone = mine.gone_of(tile);
  const bool nm = p.select == Select::nm, rounds = p.grid.bits > 0;
  __syncwarp();
#pragma unroll 4
  for (int i = 0; i < 32; i += 2) {
    const int r = i + lane / kTileColumns;
    const bool goes = __shfl_sync(cuda::kFullWarp, gone, r) >> c & 1u;
    if (row0 + r >= p.rows || j >= b.width) continue;
    const int64_t at = (row0 + r) * p.cols + b.i1 + j;
    T* W = static_cast<T*>(p.W) + at;
    const float q = out.q[c * kOutPitch + r];
    b.E[(row0 + r) * b.e_pitch + b.i1 + j] = cuda::load_float(W) - q;
    cuda::store_float(W, q);
    if (nm) p.mask[at] = !goes;
    if (rounds) p.codes[at] = out.code[c * kCodePitch + r];
  }
  __syncwarp();
}

// T of 32 rows to shared memory, transposed, and the mask of those modes that have one by now.
template <class T>
__device__ inline void read_rows(const Obs& p, const Block& b, const float* D, int64_t row0,
                                 float* t, Row& mine) {
  const int lane = threadIdx.x % 32;
  const bool given = p.select == Select::given, cut = p.select == Select::unstructured;
  const uint32_t threshold = cut && b.cut ? b.cut->prefix[kPasses] : 0;
  const int64_t ties = cut && b.cut ? b.cut->cut : -1;
  unsigned words[kB / 32] = {};
#pragma unroll 2
  for (int r = 0; r < 32; ++r) {
    const int64_t row = row0 + r;
#pragma unroll
    for (int i = 0; i < kB / 32; ++i) {
      const int j = i * 32 + lane;
      const bool there = row < p.rows && j < b.width;
      const int64_t at = row * p.cols + b.i1 + j;
      float x = 0.f;
      if (there && (b.entered || b.i1 > 0)) x = b.T[row * kB + j];
      if (there && !b.entered) x += cuda::load_float(static_cast<const T*>(p.W) + at);
      t[j * mine.pitch + r] = x;
      bool gone = there && given && !p.mask[at];
      if (there && cut) {
        gone = goes(score_bits(x, D[j]), row * kB + j, threshold, ties);
        p.mask[at] = !gone;
      }
      if (given || cut) {
        const unsigned bits = __ballot_sync(cuda::kFullWarp, gone);
        words[i] = lane == r ? bits : words[i];
      }
    }
  }
  mine.gone0 = words[0] | static_cast<uint64_t>(words[1]) << 32;
  mine.gone1 = words[2] | static_cast<uint64_t>(words[3]) << 32;
  __syncwarp();
}

// Which grid column j of the block starts to read, -1: that of the column before it.
__device__ inline int grid_at(const Obs& p, const Block& b, int j) {
  const int64_t column = b.i1 + j;
  const auto group = [&](int64_t k) { return p.group_of ? p.group_of[k] : k / p.group; };
  if (j > 0 && group(column) == group(column - 1)) return -1;
  return static_cast<int>(group(column));
}

template <class T>
__global__ void __launch_bounds__(kMostWarps * 32) sweep_kernel(const Obs p, const Block b) {
  DISTAYA_DYNAMIC_SHARED(float, shared);
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float *N = shared, *D = N + kPacked;
  int* group = reinterpret_cast<int*>(D + kB);
  float* rows = D + 2 * kB;
  float* q = rows + kB * pitch_of(warps) + warp * kOutWords;
  const bool reads = p.grid.bits > 0 && (!p.dynamic || p.reference);
  load_packed(b.N, N);
  for (int j = threadIdx.x; j < b.width; j += blockDim.x) {
    D[j] = b.D[j];
    if (reads) group[j] = grid_at(p, b, j);
  }
  __syncthreads();
  const int64_t row0 = (static_cast<int64_t>(blockIdx.x) * warps + warp) * 32, at = row0 + lane;
  if (row0 >= p.rows) return;  // whole warps; there is no further barrier of the block

  Row row{.t = rows + threadIdx.x, .pitch = pitch_of(warps), .gone0 = 0, .gone1 = 0, .done = 0};
  read_rows<T>(p, b, D, row0, rows + 32 * warp, row);
  const Out out{q, reinterpret_cast<uint8_t*>(q + 16 * kOutPitch)};
  const bool real = at < p.rows, fits = p.grid.bits > 0 && p.dynamic;
  const int m = p.select == Select::nm ? static_cast<int>(p.m) : kB + 1;
  const int width = fits ? static_cast<int>(p.group) : kB + 1;
  const auto fit_group = [&](int j) {
    const Fitted fit = fit_columns(p.grid, row, j, j + width < b.width ? j + width : b.width);
    const int64_t grid = at * p.groups + (b.i1 + j) / p.group;
    if (real) p.scales[grid] = fit.scale, p.zeros[grid] = fit.zero;
    return fit;
  };
  if (fits && p.reference)  // as published: all grids of the block from its entry weights
    for (int j = 0; j < b.width; j += width) fit_group(j);

  const int64_t grids = real ? at * p.groups : 0;
  const Visit v{.N = N,
                .D = D,
                .rounds = p.grid.bits > 0,
                .reads = reads && real,
                .top = top_code(p.grid),
                .group = group,
                .scales = p.scales + grids,
                .zeros = p.zeros + grids,
                .q = out.q + lane,
                .code = out.code + lane};
  Fitted fit{1.f, 0.f};
  double loss = 0;
  for (int tile = 0; tile * kTileColumns < b.width; ++tile) {
    const int first = tile * kTileColumns;
    const int end = first + kTileColumns < b.width ? first + kTileColumns : b.width;
    bring(row, N, tile, first);
    for (int j = first; j < end;) {
      if (j % m == 0 && m <= kB) {
        look_ahead(row, N, j, j + m < b.width ? j + m : b.width);
        choose(p, b.width, row, D, j);
      }
      if (!reads && fits && j % width == 0) {
        look_ahead(row, N, j, j + width < b.width ? j + width : b.width);
        fit = fit_group(j);
      }
      int stop = (j / m + 1) * m < end ? (j / m + 1) * m : end;
      if (!reads && fits && (j / width + 1) * width < stop) stop = (j / width + 1) * width;
      loss += visit(v, row, tile, j - first, stop - first, fit);
      j = stop;
    }
    write_tile<T>(p, b, row, tile, row0, out);
  }
  if (real) p.loss[at] = (b.i1 == 0 ? 0. : p.loss[at]) + 0.5 * loss;
}

}  // namespace distaya
