// The factorisation of a diagonal block (block.cuh), last column first.
#pragma once

#include "cholesky/block.cuh"

namespace distaya::cuda {

struct Pivots {
  float least;     // smaller pivots are raised to it
  int64_t column;  // of H, where the block begins
  int width;       // columns that are there; pivots beyond are 1
  int64_t* info;
};

// What becomes of a pivot: the number that stands for it, and one over that number's root.
struct Pivot {
  bool finite, drop;
  float value, inverse;

  __device__ Pivot(float found, bool real, float least)
      : finite(isfinite(found)), drop(finite && found < least && real) {
    value = drop ? least : found;
    // rsqrtf is off by two units in the last place; the Newton step leaves about one.
    inverse = rsqrtf(value);
    inverse = fmaf(0.5f * inverse, fmaf(-value * inverse, inverse, 1.f), inverse);
  }
};

// Columns top - 1 .. top - 8 of a square, by one warp. Lane i has row i of it in a and, as column
// i, the sums s[r] = sum over finished m of R[r, m] U[m, i] for the inverse: both wait for the same
// broadcast column. Registers move up by one place per column (the products that update them write
// one place further), so that the loop need not be unrolled: column j is always in place top - 1.
// The next pivot is worked out beside the products of this column: all lanes have what it takes.
template <int top>
__device__ inline void factor_eight(Diagonal& d, int square, float (&a)[kSquare],
                                    float (&s)[kSquare], const Pivots& p) {
  const int lane = threadIdx.x % 32;
  float *R = d.square(square, square), *V = d.V[square];
  const auto pivot_at = [&](float found, int j) {
    return Pivot(found, square * kSquare + j < p.width, p.least);
  };
  Pivot pivot = pivot_at(__shfl_sync(kFullWarp, a[top - 1], top - 1), top - 1);
#pragma unroll 1
  for (int step = 0; step < 8; ++step) {
    const int j = top - 1 - step, next = j > 0 ? j - 1 : 0;
    const float coupling = __shfl_sync(kFullWarp, a[top - 1], next),
                diagonal = __shfl_sync(kFullWarp, a[top - 2], next);
    const float v = lane < j && !pivot.drop ? a[top - 1] * pivot.inverse : 0.f;
    const float u = ((lane == j ? 1.f : 0.f) - s[top - 1]) * pivot.inverse;
    float* column = d.column[step % 2];
    column[lane + step] = v;  // register l now stands for row l - step
    const Pivot now = pivot;
    const float v_next = pivot.drop ? 0.f : coupling * pivot.inverse;
    pivot = pivot_at(fmaf(-v_next, v_next, diagonal), next);
    __syncwarp();
#pragma unroll
    for (int l = top - 4; l >= 0; l -= 4) {
      const float4 x = *reinterpret_cast<const float4*>(column + l);
      const float r[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int e = 3; e >= 0; --e)
        if (l + e < top - 1) {
          a[l + e + 1] = fmaf(-v, r[e], a[l + e]);
          s[l + e + 1] = fmaf(r[e], u, s[l + e]);
        }
    }
    V[j * kSquareStride + lane] = u;
    if (lane <= j) R[lane * kStride + j] = lane < j ? v : sqrtf(now.value);
    if (lane == 0) {
      const int at = square * kSquare + j;
      d.dropped[at] = now.drop;
      if (now.drop && p.info[kFloored]++ == 0) p.info[kFirstFloored] = p.column + at;
      if (!now.finite && p.info[kNotFinite] < 0) p.info[kNotFinite] = p.column + at;
    }
  }
#pragma unroll
  for (int l = 0; l + 8 < top; ++l) a[l] = a[l + 8], s[l] = s[l + 8];
}

__device__ inline void factor_square(Diagonal& d, int square, const Pivots& p) {
  float a[kSquare], s[kSquare] = {};
  const float* row = d.square(square, square) + threadIdx.x % 32 * kStride;
#pragma unroll
  for (int l = 0; l < kSquare; l += 4) {
    const float4 x = *reinterpret_cast<const float4*>(row + l);
    a[l] = x.x, a[l + 1] = x.y, a[l + 2] = x.z, a[l + 3] = x.w;
  }
  __syncwarp();  // the square is written from here on
  factor_eight<32>(d, square, a, s, p);
  factor_eight<24>(d, square, a, s, p);
  factor_eight<16>(d, square, a, s, p);
  factor_eight<8>(d, square, a, s, p);
}

// Squares (i, b), i < b, become R's: X <- X V_b^T, 0 in dropped columns. 16 rows to a warp.
__device__ inline void solve_squares(Diagonal& d, int b) {
  const int warp = threadIdx.x / 32;
  if (warp >= 2 * b) return;
  float* X = d.square(0, b) + 16 * warp * kStride;
  float sum[1][4][4] = {};
  multiply(sum, X, kStride, d.V[b], 1, kSquareStride);
  __syncwarp();  // all lanes have read what is overwritten now
  each(sum,
       [&](int r, int c, float x) { X[r * kStride + c] = d.dropped[b * kSquare + c] ? 0.f : x; });
}

// The next diagonal square, which is waited for: 16 x 8 of it to each of the eight warps.
__device__ inline void update_next(Diagonal& d, int b) {
  const int row = threadIdx.x / 128 * 16, col = threadIdx.x / 32 % 4 * 8;
  const float* X = d.square(b - 1, b);
  float* out = d.square(b - 1, b - 1) + row * kStride + col;
  float sum[1][1][4] = {};
  multiply(sum, X + row * kStride, kStride, X + col * kStride, 1, kStride);
  each(sum, [&](int r, int c, float x) { out[r * kStride + c] -= x; });
}

// All other squares (i, l), i <= l < b, by warps 1 .. 7, 16 rows to a task.
__device__ inline void update_others(Diagonal& d, int b) {
  for (int t = threadIdx.x / 32 - 1; t < b * (b + 1) - 2; t += 7) {
    int l = 0, i = t / 2;
    while (i > l) i -= ++l;
    const int row = t % 2 * 16;
    float* out = d.square(i, l) + row * kStride;
    float sum[1][4][4] = {};
    multiply(sum, d.square(i, b) + row * kStride, kStride, d.square(l, b), 1, kStride);
    each(sum, [&](int r, int c, float x) { out[r * kStride + c] -= x; });
  }
}

// d.R's upper triangle becomes R; inverse_at is its inverse.
__device__ inline void factor_block(Diagonal& d, const Pivots& p) {
  for (int b = kSquares - 1; b >= 0; --b) {
    if (threadIdx.x < 32) {
      factor_square(d, b, p);
    } else if (b + 1 < kSquares) {
      update_others(d, b + 1);
      sum_rows(d, b, 1, 7);
    }
    __syncthreads();
    solve_squares(d, b);
    finish_rows(d, b, 0, 8);
    __syncthreads();
    if (b > 0) update_next(d, b);
    __syncthreads();
  }
}

}  // namespace distaya::cuda
