// H += sum_t w_t x_t x_t^T for 16-bit X on tensor cores (mma.m16n8k16, any device from sm_80 on).
//
// A block of 8 warps owns 256 x 128 elements of H, a warp 64 x 64 of them, and walks over the
// tokens in slices of 32. Counted for one slice on an H100 (132 SMs, mma.sync at about 1290
// multiply-adds a clock and SM), none of it measured: products 813 clocks; 24 KB from L2, 30 bytes
// a clock; 64 KB read and 24 KB written in shared memory, 704 clocks; the 128 additions a thread
// take 256 of the 813 issue slots of a scheduler. A square of 128 would need 40 bytes a clock from
// L2, and warp tiles of 64 x 32 more of shared memory than it has.
//
// Sums on tensor cores and totals in fp32 are 2 x 128 registers a thread, more than there are. So a
// warp keeps the left operand of the whole slice (32 registers), forms the sums of 16 columns at a
// time (32 registers) and adds them to the totals (128 registers) at once.
#pragma once

#include "hessian/syrk_load.cuh"

namespace distaya::syrk {

template <class T>
__device__ inline float low_half(uint32_t pair) {
  const T value{static_cast<uint16_t>(pair)};
  return cuda::load_float(&value);
}

template <class T>
__device__ inline float high_half(uint32_t pair) {
  return low_half<T>(pair >> 16);
}

// 64 x 64 elements of H in a warp. Operands of both sides lie as [tokens][channels] and are
// transposed on the way to registers. The four 8 x 8 matrices that 16 tokens x 16 channels consist
// of come in the order of mma's A for rows, and as two B, first channels 0 .. 7, for columns.
template <class T>
class WarpTile {
  static constexpr uint32_t kTf32 = 0xffffe000u;  // the bits of a float that a tf32 has

 public:
  float total[4][8][4] = {};  // [m][n]: mma's D for rows 16 m .. and columns 8 n ..

  // rows, columns: where the 64 channels of either side begin, in bytes from that of a stage
  __device__ WarpTile(const char* shared, int rows, int columns) : shared_(shared) {
    const int lane = static_cast<int>(threadIdx.x) % 32;  // gives row lane % 8 of matrix lane / 8
    const int low = lane / 8 % 2, high = lane / 16, row = lane % 8;
    rows_ = rows + (8 * high + row) * kRow + 16 * (low ^ row);
    columns_ = columns + (8 * low + row) * kRow + 16 * (high ^ row);
  }

  // Of tokens 16 h .. 16 h + 15 of the stage: all rows and columns 0 .. 15.
  __device__ void load_first(int stage, int h) {
#pragma unroll
    for (int m = 0; m < 4; ++m) load(rows_of_[h][m], stage + rows_, h, m);
    load_columns(stage, h, 0);
  }

  // Columns 0 .. 47, each 16 while those that follow are loaded.
  __device__ void add_three(int stage, float weight) {
#pragma unroll
    for (int q = 0; q < 3; ++q) {
      load_columns(stage, 0, q + 1), load_columns(stage, 1, q + 1);
      add(q, weight, [](int) {});
    }
  }

  // total += weight * (products of columns 16 q .. 16 q + 15); `between(h)` is called when the rows
  // of tokens 16 h .. 16 h + 15 are not needed again.
  template <class Between>
  __device__ void add(int q, float weight, Between between) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float sum[4][4] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t (&b)[4] = columns_of_[q % 2][h];
#pragma unroll
        for (int m = 0; m < 4; ++m) ptx::mma<T>(sum[m], rows_of_[h][m], b[2 * n], b[2 * n + 1]);
        if (n == 1) between(h);
      }
      promote(2 * q + n, weight, sum);
    }
  }

  // total += all products of the stage where weights differ. w x of the
  // left side is formed in fp32 and enters as two tf32 parts: about 8 times the work, which loads
  // its operands as it goes.
  __device__ void add_weighted(int stage, const float (&weights)[kSlice]) {
#pragma unroll 1
    for (int n = 0; n < 8; ++n) {
      float sum[4][4] = {};
#pragma unroll 1
      for (int h = 0; h < 2; ++h) {
        uint32_t a[4], b[4];
        load(b, stage + columns_, h, n / 2);
        if (n % 2) b[0] = b[2], b[1] = b[3];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          load(a, stage + rows_, h, m);
          multiply_weighted(sum[m], a, b, weights + 16 * h);
        }
      }
#pragma unroll
      for (int k = 0; k < 8; ++k)
        if (k == n) promote(k, 1.f, sum);
    }
    forget();
  }

 private:
  // Tells the compiler that no register need be kept for the operands.
  __device__ void forget() {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int m = 0; m < 4; ++m) rows_of_[h][m][i] = 0;
        columns_of_[0][h][i] = columns_of_[1][h][i] = 0;
      }
  }

  // Tokens 16 h .. 16 h + 15, the k-th 16 of the 64 channels at `side`: two chunks, so bits 5
  // and 6.
  __device__ void load(uint32_t (&out)[4], int side, int h, int k) {
    ptx::load_transposed(out, shared_ + (side ^ 32 * k) + h * 16 * kRow);
  }

  // Columns 16 q .. 16 q + 15; there is room for two q, one even and one odd.
  __device__ void load_columns(int stage, int h, int q) {
    load(columns_of_[q % 2][h], stage + columns_, h, q);
  }

  // 16 tokens. Of the 8 tokens of mma_tf32, c and c + 4 are the two in a register.
  __device__ static void multiply_weighted(float (&sum)[4], const uint32_t (&a)[4],
                                           const uint32_t (&b)[4], const float* weights) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {  // registers e and e + 1: tokens 4 e + {2 c, 2 c + 1}
      const float* w = weights + 4 * e + threadIdx.x % 4 * 2;
      const float w0 = w[0], w1 = w[1];
      const float x[4] = {w0 * low_half<T>(a[e]), w0 * low_half<T>(a[e + 1]),
                          w1 * high_half<T>(a[e]), w1 * high_half<T>(a[e + 1])};
      uint32_t large[4], small[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        large[i] = __float_as_uint(x[i]) & kTf32;
        const float rest = x[i] - __uint_as_float(large[i]);  // exact, 13 bits
        small[i] = (__float_as_uint(rest) + 0x1000u) & kTf32;
      }
      const uint32_t b0 = __float_as_uint(low_half<T>(b[e / 2]));  // 16-bit values are tf32 values
      const uint32_t b1 = __float_as_uint(high_half<T>(b[e / 2]));
      ptx::mma_tf32(sum, small, b0, b1);
      ptx::mma_tf32(sum, large, b0, b1);
    }
  }

  __device__ void promote(int n, float weight, const float (&sum)[4][4]) {
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) total[m][n][e] = fmaf(weight, sum[m][e], total[m][n][e]);
  }

  uint32_t rows_of_[2][4][4];     // [h][m]
  uint32_t columns_of_[2][2][4];  // [q % 2][h]
  const char* shared_;
  int rows_, columns_;  // of the row of a matrix whose address this lane gives
};

// total = H, or H = total, for the elements on and above the diagonal; begins at row i0, column j0.
template <bool store>
__device__ inline void exchange(const Hessian& p, float (&total)[4][8][4], int i0, int j0) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float* const H = p.H + static_cast<int64_t>(i0 + lane / 4) * p.C + j0 + lane % 4 * 2;
  const bool pairs = p.C % 2 == 0 && reinterpret_cast<uintptr_t>(p.H) % 8 == 0;
  const bool whole = pairs && i0 < j0 && j0 + 64 <= p.C;
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* const row = H + (16 * m + 8 * half) * p.C;
      if (whole) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          auto& both = *reinterpret_cast<float2*>(row + 8 * n);
          float* mine = total[m][n] + 2 * half;
          if constexpr (store)
            both = {mine[0], mine[1]};
          else
            mine[0] = both.x, mine[1] = both.y;
        }
        continue;
      }
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = i0 + 16 * m + 8 * half + lane / 4, j = j0 + 8 * n + lane % 4 * 2 + e;
          if (i > j || j >= p.C) continue;
          if constexpr (store)
            row[8 * n + e] = total[m][n][2 * half + e];
          else
            total[m][n][2 * half + e] = row[8 * n + e];
        }
    }
}

// Where the 64 x 64 elements of this warp are. Some are nowhere in the upper triangle: such a warp
// multiplies what is at hand, as idle it would save no time, but leaves H alone.
struct Place {
  int rows, columns;  // their channels, in bytes from the beginning of a stage on
  int i0, j0;
  bool inside;
};

__device__ inline Place place_of(const Tile& tile, int64_t C) {
  const int warp = static_cast<int>(threadIdx.x) / 32, i = warp / 2 % 2 * 64, j = warp % 2 * 64;
  const bool there = tile.panel[warp / 4] >= 0;
  const int row = there ? warp / 4 : 0, column = tile.columns[row];
  const int i0 = tile.panel[row] * kPanel + i, j0 = tile.panel[column] * kPanel + j;
  return {row * kPanelBytes + 2 * i, column * kPanelBytes + 2 * j, i0, j0,
          there && i0 <= j0 && j0 < C};
}

template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads, 1) syrk_kernel(const __grid_constant__ Hessian p) {
  DISTAYA_DYNAMIC_SHARED(char, shared);
  __shared__ Common common;
  if (threadIdx.x == 0) prepare(common, p);
  __syncthreads();
  Loader<T, aligned> loader(p, common, shared);
#pragma unroll 1
  for (int slice = 0; slice < kStages; ++slice) loader.load(slice);
  const Place place = place_of(common.tile, p.C);
  WarpTile<T> part(shared, place.rows, place.columns);
  if (place.inside) exchange<false>(p, part.total, place.i0, place.j0);
  ptx::copy_wait<kStages - 1>();
  __syncthreads();
  part.load_first(0, 0), part.load_first(0, 1);
  const int tokens = static_cast<int>(p.T);
#pragma unroll 1
  for (int slice = 0; slice * kSlice < tokens; ++slice) {
    const int stage = slice % kStages;
    const Weights w(common.weights[stage]);
    const bool simple = w.any && !w.differ;
    if (simple)
      part.add_three(stage * kStageBytes, w.one);
    else if (w.differ)
      part.add_weighted(stage * kStageBytes, common.weights[stage]);
    // Now all operands of this slice are in registers, and the next one has arrived for all.
    ptx::copy_wait<kStages - 2>();
    __syncthreads();
    const bool last = (slice + 1) * kSlice >= tokens;  // then what is loaded is not used
    const int next = (last ? slice : slice + 1) % kStages * kStageBytes;
    if (simple) {
      part.add(3, w.one, [&](int h) { part.load_first(next, h); });
    } else {
      part.load_first(next, 0), part.load_first(next, 1);
    }
    loader.load(slice + kStages);  // into the stage just left
  }
  const Place end = place_of(common.tile, p.C);  // again, so as not to hold it in registers
  if (end.inside) exchange<true>(p, part.total, end.i0, end.j0);
}

}  // namespace distaya::syrk
