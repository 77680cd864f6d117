// H += sum_t w_t x_t x_t^T for 16-bit X on tensor cores (mma.m16n8k16, any device from sm_80 on),
// or, `cross`, G += sum_t w_t y_t x_t^T: the same tiles, but everywhere, and with rows from Y.
//
// A block of 8 warps owns 256 x 128 elements of H, a warp 64 x 64 of them, and walks over the
// tokens in slices of 32. Counted for one slice on an H100 (132 SMs, mma.sync at about 1290
// multiply-adds a clock and SM), none of it measured: products 813 clocks; 24 KB from L2, 30 bytes
// a clock; 64 KB read and 24 KB written in shared memory, 704 clocks; 326 instructions a warp, so
// 652 of the 813 issue slots of a scheduler. A square of 128 would need 40 bytes a clock from L2,
// and warp tiles of 64 x 32 more of shared memory than it has.
//
// Sums on tensor cores and totals in fp32 are 2 x 128 registers a thread, more than there are. So a
// warp keeps the left operand of the whole slice (32 registers), forms the sums of 8 columns at a
// time (16 registers) and adds them to the totals (128 registers) at once. That is one block on an
// SM, so nothing hides its ends: H is read while the first slice is multiplied.
#pragma once

#include "hessian/syrk_load.cuh"

namespace distaya::syrk {

// 64 x 64 elements of H in a warp. Operands of both sides lie as [tokens][channels] and are
// transposed on the way to registers. The four 8 x 8 matrices that 16 tokens x 16 channels consist
// of come in the order of mma's A for rows, and as two B, first channels 0 .. 7, for columns.
template <class T>
class WarpTile {
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

 private:
  // Tokens 16 h .. 16 h + 15, the k-th 16 of the 64 channels at `side`: two chunks, so bits 5
  // and 6.
  __device__ void load(uint32_t (&out)[4], int side, int h, int k) {
    ptx::load_transposed(out, shared_ + (side ^ 32 * k) + h * 16 * kRow);
  }

  // Columns 16 q .. 16 q + 15; there is room for two q, one even and one odd.
  __device__ void load_columns(int stage, int h, int q) {
    load(columns_of_[q % 2][h], stage + columns_, h, q);
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

// total = H, or H = total, for the elements on and above the diagonal, of a cross moment for all;
// begins at row i0, column j0.
template <bool store, bool cross>
__device__ inline void exchange(const Hessian& p, float (&total)[4][8][4], int i0, int j0) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float* const H = p.H + static_cast<int64_t>(i0 + lane / 4) * p.C + j0 + lane % 4 * 2;
  const bool pairs = p.C % 2 == 0 && reinterpret_cast<uintptr_t>(p.H) % 8 == 0;
  const bool whole = pairs && (cross ? i0 + 64 <= p.K : i0 < j0) && j0 + 64 <= p.C;
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
          if ((cross ? i >= p.K : i > j) || j >= p.C) continue;
          if constexpr (store)
            row[8 * n + e] = total[m][n][2 * half + e];
          else
            total[m][n][2 * half + e] = row[8 * n + e];
        }
    }
}

template <class T, bool aligned, bool cross>
__global__ void __launch_bounds__(kThreads, 1) syrk_kernel(const __grid_constant__ Hessian p) {
  DISTAYA_DYNAMIC_SHARED(char, shared);
  __shared__ Common common;
  if (threadIdx.x < kThreads / 32) prepare<cross>(common, p);
  __syncthreads();
  Loader<T, aligned, cross> loader(p, common, shared);
#pragma unroll 1
  for (int slice = 0; slice < kStages; ++slice) loader.load(slice);
  const Place place = common.place[threadIdx.x / 32];
  WarpTile<T> part(shared, place.rows, place.columns);
  if (place.inside) exchange<false, cross>(p, part.total, place.i0, place.j0);
  ptx::copy_wait<kStages - 1>();
  __syncthreads();
  part.load_first(0, 0), part.load_first(0, 1);
#pragma unroll 1
  for (int stage = 0; common.slice[stage].tokens; stage = (stage + 1) % kStages) {
    const float weight = common.slice[stage].weight;
    if (weight != 0) part.add_three(stage * kStageBytes, weight);
    // Now all operands of this slice are in registers, and the next one has arrived for all.
    ptx::copy_wait<kStages - 2>();
    __syncthreads();
    const int next = (stage + 1) % kStages;
    const int at = (common.slice[next].tokens ? next : stage) * kStageBytes;  // or what is there
    if (weight != 0) {
      part.add(3, weight, [&](int h) { part.load_first(at, h); });
    } else {
      part.load_first(at, 0), part.load_first(at, 1);
    }
    loader.load(stage);
  }
  const Place end = common.place[threadIdx.x / 32];  // again, so as not to hold it in registers
  if (end.inside) exchange<true, cross>(p, part.total, end.i0, end.j0);
}

}  // namespace distaya::syrk
