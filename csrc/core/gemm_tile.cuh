// One tile of a product (gemm.cuh has the arithmetic), computed by a thread block of 256.
//
// Slices of k travel by cp.async into a ring of buffers while earlier ones are multiplied.
// Splitting operands happens when fragments are loaded. Counted for 8 steps of k of a warp's 64 x
// 32: 48 products (at least 192 clocks of the tensor core), 72 instructions to split 24 values a
// lane, 6 ldmatrix of 24 wavefronts in all. Splitting once at the store instead would take
// registers between copy and store, no cp.async, and twice the wavefronts: four warps share their
// pipe, so 192 clocks of it, as many as the products take.
#pragma once

#include "core/gemm.cuh"
#include "core/ptx.cuh"

namespace distaya::cuda {

inline constexpr int kGemmThreads = 256;

// A tile's rows and columns, the depth of a slice of k, slices in the ring, warps along m, n and k.
template <int m, int n, int depth, int ring, int warps_m, int warps_n, int warps_k>
struct TileShape {
  static constexpr int kRows = m, kCols = n, kDepth = depth, kRing = ring;
  static constexpr int kWarpsM = warps_m, kWarpsN = warps_n, kWarpsK = warps_k;
  static constexpr int kI = m / warps_m / 16, kJ = n / warps_n / 8;  // products of a warp per step
  static constexpr int kSteps = depth / 8 / warps_k;                 // of 8 k, per warp and slice
  static constexpr int kBlocks = m * n > 64 * 64 ? 1 : 2;  // per multiprocessor, by registers
  static_assert(32 * warps_m * warps_n * warps_k == kGemmThreads && kJ % 2 == 0);
  static_assert(kSteps <= 2, "tensor cores may sum over 16 steps of k only");
};

// 12 bytes of operands per 64 products; 82 KB of shared memory at most.
using LargeTile = TileShape<128, 128, 16, 4, 2, 4, 1>;
// For products with few tiles. Two groups of warps take half of every slice each: warps of 32 x 32
// halve the splitting that eight warps of 32 x 16 would do. 55 KB: two or more blocks to an SM.
using SmallTile = TileShape<64, 64, 32, 3, 2, 2, 2>;

// Brings slices of one operand X[i, p] (i along m or n, p along k) into shared memory. Lines of a
// slice are those along which threads and bytes are neighbours: along k or along i. Their padding
// puts the eight rows of a fragment (16 bytes each), or its 4 x 8 words, on 32 different banks.
template <bool along_k, int tile, int depth>
struct Feed {
  static constexpr int kLines = along_k ? tile : depth, kLength = along_k ? depth : tile;
  static constexpr int kStride = kLength + (along_k ? 4 : 8), kFloats = kLines * kStride;
  static constexpr int kChunks = kLength / 4, kHop = kGemmThreads / kChunks;
  static_assert(kLines % kHop == 0 && kStride % 4 == 0);

  const float* from;  // this thread's first chunk of the next slice; unaligned: the slice itself
  int64_t i_step, p_step;
  int lines, length;  // what is left of X from there on, across lines and along them
  bool aligned;       // lines may be copied by chunks of 16 bytes

  // X begins at the tile's first row, of which `rows` are there.
  __device__ Feed(const float* X, int64_t i_step, int64_t p_step, int64_t rows, int64_t k)
      : from(X),
        i_step(i_step),
        p_step(p_step),
        lines(static_cast<int>(along_k ? (rows < tile ? rows : tile) : k)),
        length(static_cast<int>(along_k ? k : (rows < tile ? rows : tile))),
        aligned((along_k ? p_step : i_step) == 1 && line_step() % 4 == 0 &&
                reinterpret_cast<uintptr_t>(X) % 16 == 0) {
    if (!aligned) return;
    from += first_line() * line_step() + first_place();
    lines -= first_line(), length -= first_place();
  }

  __device__ int64_t line_step() const { return along_k ? i_step : p_step; }

  __device__ static int first_line() { return threadIdx.x / kChunks; }

  __device__ static int first_place() { return threadIdx.x % kChunks * 4; }

  // The next slice; what lies outside X becomes 0.
  __device__ void copy(float* to) {
    if (aligned) {
      to += first_line() * kStride + first_place();
      const int most = length >= 4 ? 16 : length > 0 ? 4 * length : 0;
#pragma unroll
      for (int l = 0; l < kLines; l += kHop)
        ptx::copy_async_part(to + l * kStride, from + l * line_step(), l < lines ? most : 0);
    } else {
      copy_words(to);
    }
    from += depth * p_step;
    (along_k ? length : lines) -= depth;
  }

  __device__ void copy_words(float* to) const {
#pragma unroll 1
    for (int t = threadIdx.x; t < kLines * kLength; t += kGemmThreads) {
      const int line = t / kLength, at = t % kLength;
      const bool there = line < lines && at < length;
      const float* x = from + (along_k ? line : at) * i_step + (along_k ? at : line) * p_step;
      ptx::copy_async_word(to + line * kStride + at, there ? x : from, there);
    }
  }

  // 16 rows x 8 k at (row, p) of a slice. With g = lane / 4, c = lane % 4: (g, c), (g + 8, c),
  // (g, c + 4), (g + 8, c + 4): operand A of a product, or two neighbouring operands B.
  __device__ static void load(const float* slice, int row, int p, uint32_t (&out)[4]) {
    const int lane = threadIdx.x % 32;
    if constexpr (along_k) {
      ptx::load_matrices(out, slice + (row + lane % 16) * kStride + p + lane / 16 * 4);
    } else {
      const float* at = slice + (p + lane % 4) * kStride + row + lane / 4;
      out[0] = __float_as_uint(at[0]), out[1] = __float_as_uint(at[8]);
      out[2] = __float_as_uint(at[4 * kStride]), out[3] = __float_as_uint(at[4 * kStride + 8]);
    }
  }
};

// high: x rounded to tf32, ties away from zero, by two integer instructions (cvt.rna takes four on
// sm_90, for the sake of Inf and NaN, which reach `low` as NaN here). low: products do not look at
// its last 13 bits, and of x - high, which is exact, no more than the last of 12 is there.
template <int count>
__device__ inline void split(const uint32_t (&x)[count], uint32_t (&high)[count],
                             uint32_t (&low)[count]) {
#pragma unroll
  for (int e = 0; e < count; ++e) {
    high[e] = (x[e] + 0x1000u) & 0xffffe000u;
    low[e] = __float_as_uint(__uint_as_float(x[e]) - __uint_as_float(high[e]));
  }
}

// The tile of C that begins at (i0, j0): its sums over k, spread over the block's registers.
template <class Shape, bool a_along_k, bool b_along_k>
class TileProduct {
  static constexpr int kI = Shape::kI, kJ = Shape::kJ;
  using FeedA = Feed<a_along_k, Shape::kRows, Shape::kDepth>;
  using FeedB = Feed<b_along_k, Shape::kCols, Shape::kDepth>;
  static constexpr int kSlice = FeedA::kFloats + FeedB::kFloats;

 public:
  static constexpr int kShared = Shape::kRing * kSlice * static_cast<int>(sizeof(float));

  // `shared`: kShared bytes, aligned to 16; free again when this returns.
  __device__ TileProduct(const Gemm& g, int64_t i0, int64_t j0, float* shared) : i0_(i0), j0_(j0) {
    const int64_t end = i0 + Shape::kRows;
    const int64_t k = g.lower_a && end < g.k ? end : g.k;
    FeedA feed_a(g.A + i0 * g.a_row, g.a_row, g.a_col, g.m - i0, k);
    FeedB feed_b(g.B + j0 * g.b_col, g.b_col, g.b_row, g.n - j0, k);
    const int slices = static_cast<int>(ceil_div<int64_t>(k, Shape::kDepth));
    const auto fetch = [&](int slice, int buffer) {
      if (slice < slices) {
        feed_a.copy(shared + buffer * kSlice);
        feed_b.copy(shared + buffer * kSlice + FeedA::kFloats);
      }
      ptx::copy_commit();
    };
#pragma unroll
    for (int s = 0; s < Shape::kRing - 1; ++s) fetch(s, s);
    int now = 0;
#pragma unroll 1
    for (int s = 0; s < slices; ++s) {
      ptx::copy_wait<Shape::kRing - 2>();
      __syncthreads();  // slice s is there for all, and all are done with slice s - 1
      fetch(s + Shape::kRing - 1, now == 0 ? Shape::kRing - 1 : now - 1);
      add_slice(shared + now * kSlice);
      now = now + 1 == Shape::kRing ? 0 : now + 1;
    }
    ptx::copy_wait<0>();
    __syncthreads();
    if constexpr (Shape::kWarpsK > 1) gather(shared);
  }

  // Puts the tile into C. mend: compute sums that are not finite again, from A and B; without it C
  // may overlap the operands where this block alone reads them.
  template <bool mend = true>
  __device__ void store(const Gemm& g) const {
    if (warp_k() > 0) return;
    const bool pairs = g.ldc % 2 == 0 && reinterpret_cast<uintptr_t>(g.C) % 8 == 0;
    uint64_t again = 0;  // bit (2 i + h) * 2 kJ + 2 j + e: a sum that is not finite
#pragma unroll
    for (int i = 0; i < kI; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t row = row_of(i) + 8 * h;
        if (row >= g.m) continue;
#pragma unroll
        for (int j = 0; j < kJ; ++j) {
          const int64_t col = col_of(j);
          const float x = sum_[i][j][2 * h], y = sum_[i][j][2 * h + 1];
          const bool first = col < g.n && (!g.upper_only || row <= col),
                     second = col + 1 < g.n && (!g.upper_only || row <= col + 1);
          float* c = g.C + row * g.ldc + col;
          if (pairs && first && second && isfinite(x) && isfinite(y)) {
            float2 old = g.overwrite ? float2{0, 0} : *reinterpret_cast<const float2*>(c);
            old.x += g.alpha * x, old.y += g.alpha * y;
            *reinterpret_cast<float2*>(c) = old;
            continue;
          }
          const int bit = (2 * i + h) * 2 * kJ + 2 * j;
          if (first && !put<mend>(g, c, x)) again |= uint64_t{1} << bit;
          if (second && !put<mend>(g, c + 1, y)) again |= uint64_t{2} << bit;
        }
      }
    while (again) {
      const int bit = __ffsll(static_cast<long long>(again)) - 1;
      again &= again - 1;
      const int line = bit / (2 * kJ), at = bit % (2 * kJ);
      sum_again(g, row_of(line / 2) + line % 2 * 8, col_of(at / 2) + at % 2);
    }
  }

 private:
  __device__ static int warp_m() { return threadIdx.x / 32 % Shape::kWarpsM; }

  __device__ static int warp_n() { return threadIdx.x / 32 / Shape::kWarpsM % Shape::kWarpsN; }

  __device__ static int warp_k() { return threadIdx.x / 32 / (Shape::kWarpsM * Shape::kWarpsN); }

  // Where sum_[i][j][0] belongs in C; elements 2 and 3 stand 8 rows further down.
  __device__ int64_t row_of(int i) const {
    return i0_ + (warp_m() * kI + i) * 16 + threadIdx.x % 32 / 4;
  }

  __device__ int64_t col_of(int j) const {
    return j0_ + (warp_n() * kJ + j) * 8 + threadIdx.x % 4 * 2;
  }

  __device__ void add_slice(const float* a) {
    const float* b = a + FeedA::kFloats;
    float fresh[kI][kJ][4] = {};
#pragma unroll
    for (int step = 0; step < Shape::kSteps; ++step) {
      const int p = (warp_k() * Shape::kSteps + step) * 8;
      uint32_t x[4], b_high[kJ / 2][4], b_low[kJ / 2][4];
#pragma unroll
      for (int j = 0; j < kJ / 2; ++j) {
        FeedB::load(b, (warp_n() * kJ + 2 * j) * 8, p, x);
        split(x, b_high[j], b_low[j]);
      }
#pragma unroll
      for (int i = 0; i < kI; ++i) {
        uint32_t high[4], low[4];
        FeedA::load(a, (warp_m() * kI + i) * 16, p, x);
        split(x, high, low);
        // Small products first; neighbours are independent of one another.
#pragma unroll
        for (int j = 0; j < kJ; ++j)
          ptx::mma_tf32(fresh[i][j], low, b_high[j / 2][j % 2], b_high[j / 2][2 + j % 2]);
#pragma unroll
        for (int j = 0; j < kJ; ++j)
          ptx::mma_tf32(fresh[i][j], high, b_low[j / 2][j % 2], b_low[j / 2][2 + j % 2]);
#pragma unroll
        for (int j = 0; j < kJ; ++j)
          ptx::mma_tf32(fresh[i][j], high, b_high[j / 2][j % 2], b_high[j / 2][2 + j % 2]);
      }
    }
#pragma unroll
    for (int i = 0; i < kI; ++i)
#pragma unroll
      for (int j = 0; j < kJ; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum_[i][j][e] += fresh[i][j][e];
  }

  // The first group of warps adds the others' sums to its own, in their order.
  __device__ void gather(float* shared) {
    constexpr int kSums = kI * kJ * 4, kGroup = Shape::kWarpsM * Shape::kWarpsN * 32;
    static_assert((Shape::kWarpsK - 1) * kSums * kGroup * 4 <= kShared);
    const int t = threadIdx.x % kGroup, group = warp_k();
    float* sums = &sum_[0][0][0];
    if (group > 0)
#pragma unroll
      for (int e = 0; e < kSums; ++e) shared[((group - 1) * kSums + e) * kGroup + t] = sums[e];
    __syncthreads();
    if (group == 0)
#pragma unroll
      for (int e = 0; e < (Shape::kWarpsK - 1) * kSums; ++e)
        sums[e % kSums] += shared[e * kGroup + t];
    __syncthreads();
  }

  template <bool mend>
  __device__ static bool put(const Gemm& g, float* c, float x) {
    if (mend && !isfinite(x)) return false;
    *c = (g.overwrite ? 0.f : *c) + g.alpha * x;
    return true;
  }

  // An element as fp32 would have it. NaN stays NaN, so its sum need not be finished.
  __device__ static void sum_again(const Gemm& g, int64_t row, int64_t col) {
    const float *a = g.A + row * g.a_row, *b = g.B + col * g.b_col;
    const int64_t k = g.lower_a && row + 1 < g.k ? row + 1 : g.k;
    float sum = 0;
    for (int64_t p = 0; p < k && !isnan(sum); ++p) sum = fmaf(a[p * g.a_col], b[p * g.b_row], sum);
    float* c = g.C + row * g.ldc + col;
    *c = (g.overwrite ? 0.f : *c) + g.alpha * sum;
  }

  int64_t i0_, j0_;
  float sum_[kI][kJ][4] = {};
};

}  // namespace distaya::cuda
