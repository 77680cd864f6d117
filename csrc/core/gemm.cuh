// A plain fp32 tiled GEMM for the device, for rooms whose own fused kernels come later:
// C[m, n] += alpha A[m, k] B[k, n], any strides, one thread order per element (deterministic).
#pragma once

#include "core/cuda.cuh"

namespace distaya::cuda {

struct Gemm {
  int64_t m, n, k;
  float alpha;
  const float* A;
  int64_t a_row, a_col;  // element strides
  const float* B;
  int64_t b_row, b_col;
  float* C;  // row-major
  int64_t ldc;
  bool upper_only = false;  // skip tiles wholly below the diagonal
};

inline constexpr int kTile = 64;   // C tile per block: 64 x 64, 256 threads of 4 x 4
inline constexpr int kDepth = 16;  // k slice held in shared memory

template <int kUnused = 0>
__global__ void __launch_bounds__(256) gemm_kernel(const Gemm g) {
  __shared__ float As[kDepth][kTile + 4];
  __shared__ float Bs[kDepth][kTile + 4];
  const int64_t i0 = static_cast<int64_t>(blockIdx.y) * kTile,
                j0 = static_cast<int64_t>(blockIdx.x) * kTile;
  if (g.upper_only && i0 >= j0 + kTile) return;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float acc[4][4] = {};
  for (int64_t p0 = 0; p0 < g.k; p0 += kDepth) {
    for (int t = threadIdx.x; t < kDepth * kTile; t += 256) {
      // Walk the unit-stride direction with consecutive threads, whichever it is.
      const int a_p = g.a_col == 1 ? t % kDepth : t / kTile,
                a_i = g.a_col == 1 ? t / kDepth : t % kTile;
      const int b_p = g.b_col == 1 ? t / kTile : t % kDepth,
                b_j = g.b_col == 1 ? t % kTile : t / kDepth;
      As[a_p][a_i] =
          i0 + a_i < g.m && p0 + a_p < g.k ? g.A[(i0 + a_i) * g.a_row + (p0 + a_p) * g.a_col] : 0.f;
      Bs[b_p][b_j] =
          j0 + b_j < g.n && p0 + b_p < g.k ? g.B[(p0 + b_p) * g.b_row + (j0 + b_j) * g.b_col] : 0.f;
    }
    __syncthreads();
#pragma unroll
    for (int p = 0; p < kDepth; ++p) {
      float a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = As[p][ty * 4 + i], b[i] = Bs[p][tx * 4 + i];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] = fmaf(a[i], b[j], acc[i][j]);
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) {
      const int64_t row = i0 + ty * 4 + i, col = j0 + tx * 4 + j;
      if (row < g.m && col < g.n) g.C[row * g.ldc + col] += g.alpha * acc[i][j];
    }
}

inline void gemm(const Gemm& g, cudaStream_t stream) {
  if (g.m <= 0 || g.n <= 0 || g.k <= 0) return;
  const dim3 grid(grid_of(ceil_div<int64_t>(g.n, kTile)),
                  grid_of(ceil_div<int64_t>(g.m, kTile), 65535));
  check(ceil_div<int64_t>(g.m, kTile) <= 65535, "gemm of ", g.m, " rows exceeds the CUDA grid");
  launch(gemm_kernel<>, grid, 256, 0, stream, g);
}

}  // namespace distaya::cuda
