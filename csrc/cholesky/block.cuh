// A diagonal block of 128 columns, factored and inverted by one thread block in shared memory.
//
// It is cut into 4 x 4 squares of 32. One warp factors and inverts a diagonal square in registers
// while the other seven update what is left with tensor cores; between two squares the block meets
// three times. What the next step of the factorisation waits for is therefore four times a warp's
// 32 columns: about 100 instructions each and a chain of some 90 clocks from pivot to pivot.
#pragma once

#include "cholesky/cholesky.h"
#include "core/gemm_tile.cuh"

namespace distaya::cuda {

inline constexpr int kBlock = 128, kSquare = 32, kSquares = kBlock / kSquare;
inline constexpr int kStride = kBlock + 4;         // eight rows of four words: 32 banks
inline constexpr int kSquareStride = kSquare + 4;  // likewise

// In shared memory. Square (i, l) of R stands at its place for i <= l; the places below the
// diagonal hold R's inverse, square (i, l) of it at (l, i), upright. The diagonal squares of the
// inverse are in V.
struct Diagonal {
  float R[kBlock * kStride];
  float V[kSquares][kSquare * kSquareStride];
  float column[2][kSquare + 8];  // a finished column, for all lanes to read
  int dropped[kBlock];           // floored columns, whose couplings vanish

  __device__ float* square(int i, int l) { return R + i * kSquare * kStride + l * kSquare; }
};

// sum[I][J] = A [16 I, 32] B [32, 8 J], by one warp; strides in floats, all in shared memory.
template <int I, int J>
__device__ inline void multiply(float (&sum)[I][J][4], const float* A, int a_row, const float* B,
                                int b_row, int b_col) {
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < kSquare; half += 16) {
    float fresh[I][J][4] = {};
#pragma unroll
    for (int p = half + c; p < half + c + 16; p += 8) {
      uint32_t high[I][4], low[I][4];
#pragma unroll
      for (int i = 0; i < I; ++i) {
        const float* a = A + (16 * i + g) * a_row + p;
        const uint32_t x[4] = {__float_as_uint(a[0]), __float_as_uint(a[8 * a_row]),
                               __float_as_uint(a[4]), __float_as_uint(a[8 * a_row + 4])};
        split(x, high[i], low[i]);
      }
#pragma unroll
      for (int j = 0; j < J; ++j) {
        const float* b = B + (8 * j + g) * b_col + p * b_row;
        uint32_t b_high[2], b_low[2];
        const uint32_t y[2] = {__float_as_uint(b[0]), __float_as_uint(b[4 * b_row])};
        split(y, b_high, b_low);
#pragma unroll
        for (int i = 0; i < I; ++i) {
          ptx::mma_tf32(fresh[i][j], low[i], b_high[0], b_high[1]);
          ptx::mma_tf32(fresh[i][j], high[i], b_low[0], b_low[1]);
          ptx::mma_tf32(fresh[i][j], high[i], b_high[0], b_high[1]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < I; ++i)
#pragma unroll
      for (int j = 0; j < J; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[i][j][e] += fresh[i][j][e];
  }
}

// body(row, column, value) for each of this lane's elements of `sum`.
template <int I, int J, class Body>
__device__ inline void each(const float (&sum)[I][J][4], const Body& body) {
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < I; ++i)
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) body(16 * i + g + e / 2 * 8, 8 * j + 2 * c + e % 2, sum[i][j][e]);
}

// The upper triangle of the w x w block at `from` (row stride n), 0 below it; beyond w the
// identity.
__device__ inline void load_block(Diagonal& d, const float* from, int64_t n, int w) {
  for (int t = threadIdx.x; t < kBlock * kBlock; t += kGemmThreads) {
    const int i = t / kBlock, j = t % kBlock;
    const bool there = i <= j && j < w;
    d.R[i * kStride + j] = there ? from[i * n + j] : i == j && i >= w ? 1.f : 0.f;
  }
  for (int t = threadIdx.x; t < kBlock; t += kGemmThreads) d.dropped[t] = 0;
  for (int t = threadIdx.x; t < 2 * (kSquare + 8); t += kGemmThreads) d.column[0][t] = 0;
  __syncthreads();
}

// Row i of the inverse, columns l > i, but for the factor -V_i: sum over m of R[i, m] U[m, l]. By
// warps first .. first + warps - 1; 16 rows to a task.
__device__ inline void sum_rows(Diagonal& d, int i, int first, int warps) {
  for (int t = threadIdx.x / 32 - first; t < 2 * (kSquares - 1 - i); t += warps) {
    const int l = i + 1 + t / 2, row = t % 2 * 16;
    float sum[1][4][4] = {};
    for (int m = i + 1; m < l; ++m)
      multiply(sum, d.square(i, m) + row * kStride, kStride, d.square(l, m), kStride, 1);
    multiply(sum, d.square(i, l) + row * kStride, kStride, d.V[l], kSquareStride, 1);
    float* out = d.square(l, i) + row * kStride;
    each(sum, [&](int r, int c, float x) { out[r * kStride + c] = x; });
  }
}

// Completes those rows, in place; 8 columns to a task, which one warp owns.
__device__ inline void finish_rows(Diagonal& d, int i, int first, int warps) {
  for (int t = threadIdx.x / 32 - first; t < 4 * (kSquares - 1 - i); t += warps) {
    float* S = d.square(i + 1 + t / 4, i) + t % 4 * 8;
    float sum[2][1][4] = {};
    multiply(sum, d.V[i], kSquareStride, S, kStride, 1);
    __syncwarp();  // all lanes have read what is overwritten now
    each(sum, [&](int r, int c, float x) { S[r * kStride + c] = -x; });
  }
}

// Element (i, j) of the inverse.
__device__ inline float inverse_at(Diagonal& d, int i, int j) {
  const int a = i / kSquare, b = j / kSquare, r = i % kSquare, c = j % kSquare;
  if (a > b) return 0;
  return a == b ? d.V[a][r * kSquareStride + c] : d.square(b, a)[r * kStride + c];
}

}  // namespace distaya::cuda
