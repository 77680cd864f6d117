// int4 and 2:4 int4 times many tokens on sm_90a. A block of two warpgroups multiplies 256 rows
// (four row tiles) by a pass of n = 64 or 128 tokens, one column tile a stage. Weights are operand
// A from registers: each lane turns the words it loads into 16-bit floats scale (code - zero),
// rounded once, because a pair of products holds n fp32 sums a thread and a second set of sums, to
// be scaled group by group, would not fit beside them. Activations are operand B, in the order that
// the packed words give to the columns (fragments.h).
//
// Counted, not measured: cycles of a multiprocessor for one row tile (64 x 128 weights) and 128
// tokens, int4 / 2:4. Tensor cores at 2048 multiply-adds a cycle, shared memory at 128 bytes, four
// schedulers:
//   tensor cores    8 or 4 products of 64 rows x 128 tokens, 64 each    512 / 256
//   shared memory   operand B, read by each product                     256 / 256
//                   words of the record                                  32 /  24
//                   copied in: the record; a fourth of the activations   97 /  89
//   instructions    decoding, two warps a tile                          210 / 111
//                   copies                                               60 /  60
// So int4 is bound by the tensor cores; 2:4 by shared memory, 370 cycles, 0.69 of its peak. A
// block's stage is 49 / 45 KB for 2048 / 1480 cycles: 24 / 30 bytes a cycle and multiprocessor,
// near what the L2 gives, so with very many tokens 2:4 falls to that. 64 tokens halve the products
// and operand B, not the rest: memory at 14 bytes a cycle needs 1160 / 880 cycles a stage and is
// the limit. A group of products (256 cycles, both warpgroups 512) hides the decoding of the next
// one. Registers: n sums, 2 x 16 of A, 2 x 2 of metadata; a third product would not fit.
#pragma once

#include "sqgemm/epilogue.cuh"
#include "sqgemm/multiply.cuh"
#include "sqgemm/wgmma_plan.cuh"

namespace distaya::sqgemm {

struct PairLaunch {
  PairPlan plan;
  Output out;
  pack::Format format;
  const uint8_t* weights[2];
  const uint8_t* x;  // [passes][column tiles][2 panels][n][64], as order_kernel writes it
  float* partial;    // [splits][matrices][tokens][padded rows]
};

#ifdef DISTAYA_WGMMA

// Operand A of both products over 32 columns (2:4: 64), which is two steps of the tensor cores.
template <class T, bool sparse>
struct PairWeights {
  uint32_t a[2][2][4];  // [step][product]
  uint32_t meta[2];     // of each product, 2:4

  // scales: [group of columns][64 rows], then the zeros likewise. No branches here, nor division in
  // the loop around: ptxas keeps products in flight only where it can follow their registers.
  __device__ void load(const PairLaunch& p, const uint8_t* body, const uint8_t* scales, int block,
                       int slab) {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    const int column = sparse ? 64 * block + 16 * c : 32 * block;  // all of the lane's: one group
    const int q = column >> p.plan.shift;
    if constexpr (sparse) load_words(meta, body, meta_line(block), lane, slab);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int line = sparse ? sparse_line(block, half) : int4_line(block, half);
      const int row = 32 * half + 4 * g + slab;
      uint32_t words[2];
      load_words(words, body, line, lane, slab);
      const int first = q * pack::kTileRows + row;
      const uint32_t two = *reinterpret_cast<const uint32_t*>(scales + 2 * first);
      // of a symmetric matrix: bytes that are there, but mean something else
      const uint32_t stored = *reinterpret_cast<const uint16_t*>(
          scales + (p.format.symmetric ? 0 : p.plan.zeros_at) + first);
      const uint32_t zeros = p.format.symmetric ? 0x0808u : stored;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t scale = __byte_perm(two, 0, i ? 0x3232 : 0x1010);
        uint32_t pairs[4];
        int4_pairs<T>(words[i], minus<T>(zeros >> 8 * i & 0xffu), pairs);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          a[j / 2][i][half + 2 * (j % 2)] = ptx::multiply2<T>(pairs[j], scale);
      }
    }
  }
};

// d[product] += that block of columns. x: the stage's activations.
template <class T, bool sparse, int n>
__device__ inline void multiply_pair(float (&d)[2][n / 2], PairWeights<T, sparse>& w,
                                     const uint8_t* x, int block, bool add) {
  constexpr int kPanel = n * 128, kStep = sparse ? 64 : 32;  // bytes
#pragma unroll
  for (int i = 0; i < 4; ++i) ptx::product_operand(w.a[i / 2][i % 2]);
  ptx::product_fence();
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const int at = (2 * block + step) * kStep;
    const uint64_t b = ptx::operand_b(x + at / 128 * kPanel + at % 128);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (!sparse)
        ptx::wgmma<T, n>(d[i], w.a[step][i], b, add || step > 0);
      else if (step == 0)
        ptx::wgmma_sparse<T, n, 0>(d[i], w.a[step][i], b, w.meta[i], add || step > 0);
      else
        ptx::wgmma_sparse<T, n, 1>(d[i], w.a[step][i], b, w.meta[i], add || step > 0);
    }
  }
  ptx::product_commit();
}

// How a block brings its stages in: 64 threads copy a record, all of them the activations.
template <int n>
class PairCopies {
 public:
  __device__ PairCopies(const PairLaunch& p, int64_t pass, int64_t row_block, int64_t first_tile)
      : p_(p), x_(p.x + (pass * p.format.col_tiles() + first_tile) * x_bytes()) {
    const int record = threadIdx.x / 64, warpgroup = record / 2;
    const bool two = p.plan.matrices == 2;
    const int64_t tile = two ? 2 * row_block + record % 2 : 4 * row_block + record;
    const int64_t last = p.format.row_tiles() - 1;
    row_tile_ = tile < last ? tile : last;  // behind the end: unseen
    matrix_ = two ? warpgroup : 0;
    weights_ = p.weights[matrix_] + record_at(p.format, nullptr, row_tile_, first_tile);
  }

  __device__ void row_scales(uint8_t* grid) const {
    if (threadIdx.x % 64 < 32)
      copy_row_scales(p_.format, p_.weights[matrix_], row_tile_,
                      grid + threadIdx.x / 64 * pack::kTileRows * 3);
  }

  // To the L2 cache, as prefetch_record does.
  __device__ void prefetch(int tile) const {
    const int bytes = p_.plan.chunks * 16, at = threadIdx.x % 64 * 128;
    if (at < bytes) ptx::prefetch(weights_ + static_cast<int64_t>(tile) * bytes + at);
  }

  // The record of the tile'th column tile of this block.
  __device__ void weights(int tile, uint8_t* stage) const {
    const PairPlan& plan = p_.plan;
    copy_record<64>(weights_ + static_cast<int64_t>(tile) * plan.chunks * 16, plan.head,
                    plan.chunks - plan.head, true, plan.body_at,
                    stage + x_bytes() + threadIdx.x / 64 * plan.record_bytes, threadIdx.x % 64);
  }

  __device__ void activations(int tile, uint8_t* stage) const {
    const uint8_t* from = x_ + static_cast<int64_t>(tile) * x_bytes();
    for (int at = 16 * threadIdx.x; at < x_bytes(); at += 16 * kPairThreads)
      ptx::copy_async_part(stage + at, from + at, 16);
  }

 private:
  static constexpr int x_bytes() { return n * pack::kTileCols * 2; }

  const PairLaunch& p_;
  const uint8_t* x_;
  const uint8_t* weights_;
  int64_t row_tile_;
  int matrix_;
};

// The sums of both warpgroups to shared memory as [token][kPairPitch].
template <int n>
__device__ inline void share_pair(const float (&d)[2][n / 2], float* to) {
  const int warp = threadIdx.x / 32 % 4, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  to += threadIdx.x / 128 * 128 + pair_row(0, warp, g) + 2 * c * kPairPitch;
#pragma unroll
  for (int i = 0; i < n / 2; ++i)  // element i % 4 of 8 tokens, as in mma: rows g, then g + 8
    *reinterpret_cast<float2*>(to + (i / 4 * 8 + i % 2) * kPairPitch + i % 4 / 2 * 32) =
        make_float2(d[0][i], d[1][i]);
}

// Writes y, or the sums of this split. Two rows a thread.
template <class T>
__device__ inline void write_pair(const PairLaunch& p, const float* sums, int64_t pass,
                                  int64_t row_block) {
  const PairPlan& plan = p.plan;
  const int rows = kPairRows / plan.matrices;
  const int64_t padded = p.format.row_tiles() * pack::kTileRows;
  for (int i = 2 * threadIdx.x; i < plan.n * rows; i += 2 * kPairThreads) {
    const int64_t token = pass * plan.n + i / rows, row = row_block * rows + i % rows;
    if (token >= p.out.tokens || row >= p.out.rows) continue;
    const auto total = [&](int m) {
      return *reinterpret_cast<const float2*>(sums + i / rows * kPairPitch + m * rows + i % rows);
    };
    if (plan.splits == 1) {
      finish_two<T>(p.out, token, row, total(0), total(plan.matrices - 1));
      continue;
    }
    for (int m = 0; m < plan.matrices; ++m) {
      const int64_t part = static_cast<int64_t>(blockIdx.y) * plan.matrices + m;
      *reinterpret_cast<float2*>(p.partial + (part * p.out.tokens + token) * padded + row) =
          total(m);
    }
  }
}

#endif  // DISTAYA_WGMMA

template <class T, bool sparse, int n>
__global__ void __launch_bounds__(kPairThreads, 1)
    pair_kernel(const __grid_constant__ PairLaunch p) {
#ifdef DISTAYA_WGMMA
  DISTAYA_DYNAMIC_SHARED(uint8_t, shared);
  constexpr int kStages = pair_stages(n), kAhead = kStages - 2, kBlocks = sparse ? 2 : 4;
  ptx::let_later_start();
  const PairPlan& plan = p.plan;
  const int64_t pass = blockIdx.x % plan.passes, row_block = blockIdx.x / plan.passes;
  const int64_t first = blockIdx.y * plan.split_tiles, rest = p.format.col_tiles() - first;
  const int tiles = static_cast<int>(rest < plan.split_tiles ? rest : plan.split_tiles);
  const PairCopies<n> copies(p, pass, row_block, first);
  const auto stage = [&](int tile) { return shared + tile % kStages * plan.stage_bytes; };

  for (int tile = 0; tile <= kAhead && tile < tiles; ++tile) copies.prefetch(tile);
  ptx::wait_for_earlier();
  if (p.format.group == 0) copies.row_scales(shared + plan.grid_at);
  for (int tile = 0; tile < kAhead; ++tile) {
    if (tile < tiles) copies.weights(tile, stage(tile)), copies.activations(tile, stage(tile));
    ptx::copy_commit();
  }

  const int warp = threadIdx.x / 32, slab = pair_slab(warp % 4, threadIdx.x % 32 / 4);
  const int record = warp / 2;
  const uint8_t* row_grid = shared + plan.grid_at + record * pack::kTileRows * 3;
  float d[2][n / 2];
  PairWeights<T, sparse> w[2];  // one being multiplied, one being decoded
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    ptx::copy_wait<kAhead - 1>();
    ptx::fence_for_products();
    __syncthreads();  // this tile is there, and products with the one before the last are done
    if (tile + kAhead < tiles) {
      copies.weights(tile + kAhead, stage(tile + kAhead));
      copies.activations(tile + kAhead, stage(tile + kAhead));
    }
    ptx::copy_commit();
    const uint8_t* x = stage(tile);
    const uint8_t* at = x + n * pack::kTileCols * 2 + record * plan.record_bytes;
    const uint8_t* scales = p.format.group == 0 ? row_grid : at;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      w[block % 2].load(p, at + plan.body_at, scales, block, slab);
      multiply_pair<T, sparse, n>(d, w[block % 2], x, block, tile > 0 || block > 0);
      ptx::product_wait<1>();  // the block before is done, its registers are free
    }
  }
  ptx::product_wait<0>();
  ptx::product_done(d[0]);
  ptx::product_done(d[1]);
  ptx::copy_wait<0>();
  __syncthreads();  // the stages are free for the sums
  auto* sums = reinterpret_cast<float*>(shared);
  share_pair<n>(d, sums);
  __syncthreads();
  write_pair<T>(p, sums, pass, row_block);
#endif
}

inline constexpr int kOrderThreads = 256;  // a chunk of 16 bytes each: 32 tokens of a panel

// The activations of a pass as pair_kernel's stages hold them: columns in the order of the
// products, chunks where operand_b wants them, zero behind the last column and token.
template <class T>
__global__ void __launch_bounds__(kOrderThreads)
    order_kernel(const T* x, int64_t tokens, int64_t cols, int n, bool sparse, uint4* out) {
  ptx::let_later_start();
  ptx::wait_for_earlier();
  const int groups = n / 32, group = blockIdx.x % groups;
  const int64_t panel = blockIdx.x / groups, pass = blockIdx.y;
  const int row = 32 * group + threadIdx.x / 8, chunk = threadIdx.x % 8 ^ row % 8;
  const int64_t token = pass * n + row;
  uint32_t word[4] = {};
  if (token < tokens) {
    const T* from = x + token * cols;
    for (int i = 0; i < 8; ++i) {
      const int place = static_cast<int>(panel % 2) * 64 + 8 * chunk + i;
      const int64_t column = panel / 2 * pack::kTileCols + ordered_column(sparse, place);
      if (column < cols) word[i / 2] |= static_cast<uint32_t>(from[column].bits) << 16 * (i % 2);
    }
  }
  const int64_t panels = gridDim.x / groups;
  out[((pass * panels + panel) * n + row) * 8 + threadIdx.x % 8] =
      make_uint4(word[0], word[1], word[2], word[3]);
}

}  // namespace distaya::sqgemm
