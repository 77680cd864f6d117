// Logits of 16-bit states and weights of one dtype on tensor cores (mma.m16n8k16, any device from
// sm_80 on): a sixth of the work that three products in tf32 take, and nothing is widened first.
//
// Products are exact. Tensor cores sum 32 of them at a time, from zero, in four rounds; as
// core/gemm.cuh counts, a round is off by 9 / 4 + 1 last places of fp32 at most, so all by 26 u of
// the sum of the absolute values; such sums are added up in ordinary fp32: hidden / 32 + 26 terms'
// worth of u, less than the hidden / 16 + 48 of core/gemm.cuh.
#pragma once

#include "core/cuda.cuh"
#include "core/ptx.cuh"
#include "influence/influence.h"

namespace distaya::influence {

// z [rows, ldz] = h W^T. Row i of h is row i of P below `tokens`, then row i % tokens of the
// matrices of Q, which begin `stride` elements apart. Rows are 16-byte aligned: hidden is a
// multiple of 8.
template <class T>
struct Product {
  const T *P, *Q, *W;
  int64_t tokens, stride, hidden;
  int64_t rows, columns;  // of z
  float* z;
  int64_t ldz;
};

inline constexpr int kProductThreads = 256, kTile = 128;  // a block's rows and columns of z
inline constexpr int kDepth = 32, kRing = 4;              // elements of k in a stage, stages
inline constexpr int kRowBytes = 2 * kDepth, kStageBytes = 2 * kTile * kRowBytes;
inline constexpr int kProductShared = kRing * kStageBytes;  // 64 KB

// Where a chunk of 16 bytes of a row lies in a stage (rows of h, then of W): eight rows of equal
// chunk meet all banks.
__device__ inline int place_of(int row, int chunk) {
  return row * kRowBytes + 16 * (chunk ^ row / 2 % 4);
}

template <class T>
class Feed {
 public:
  __device__ Feed(const Product<T>& g, char* shared) : hidden_(static_cast<int>(g.hidden)) {
    const int chunk = threadIdx.x % 4;
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int row = static_cast<int>(threadIdx.x) / 4 + 64 * u;
      to_[u] = shared + place_of(row, chunk);
      from_[u] = (u < 2 ? state(g, blockIdx.x * int64_t{kTile} + row)
                        : weight(g, blockIdx.y * int64_t{kTile} + row - kTile));
      there_[u] = from_[u] != nullptr;
      from_[u] = (there_[u] ? from_[u] : g.W) + 8 * chunk;
    }
    at_ = 8 * chunk;
  }

  // The next slice; zeros beyond the ends.
  __device__ void copy(int stage) {
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const bool there = there_[u] && at_ < hidden_;
      ptx::copy_async_or_zero(to_[u] + stage * kStageBytes, there ? from_[u] : from_[u] - at_,
                              there);
      from_[u] += kDepth;
    }
    at_ += kDepth;
  }

 private:
  __device__ static const T* state(const Product<T>& g, int64_t i) {
    if (i >= g.rows) return nullptr;
    if (i < g.tokens) return g.P + i * g.hidden;
    return g.Q + (i / g.tokens - 1) * g.stride + i % g.tokens * g.hidden;
  }

  __device__ static const T* weight(const Product<T>& g, int64_t j) {
    return j < g.columns ? g.W + j * g.hidden : nullptr;
  }

  char* to_[4];
  const T* from_[4];
  bool there_[4];
  int hidden_, at_;
};

// 64 x 32 elements of z in a warp; warps lie 2 along rows and 4 along columns.
template <class T>
class WarpProduct {
 public:
  __device__ WarpProduct() : row_(threadIdx.x / 32 % 2 * 64), column_(threadIdx.x / 64 * 32) {}

  __device__ void add(const char* stage) {
    float fresh[4][4][4] = {};
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
      const int chunk = 2 * step + lane / 16;
      uint32_t b[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j)
        ptx::load_matrices(b[j], stage + place_of(kTile + column_ + 16 * j + lane % 16, chunk));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t a[4];
        ptx::load_matrices(a, stage + place_of(row_ + 16 * i + lane % 16, chunk));
#pragma unroll
        for (int j = 0; j < 4; ++j)
          ptx::mma<T>(fresh[i][j], a, b[j / 2][j % 2], b[j / 2][2 + j % 2]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) total_[i][j][e] += fresh[i][j][e];
  }

  __device__ void store(const Product<T>& g) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = blockIdx.x * int64_t{kTile} + row_ + 16 * i + 8 * half + lane / 4;
        if (row >= g.rows) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int64_t column = blockIdx.y * int64_t{kTile} + column_ + 8 * j + lane % 4 * 2;
          float* z = g.z + row * g.ldz + column;
          const float* mine = total_[i][j] + 2 * half;
          if (column + 1 < g.columns)
            *reinterpret_cast<float2*>(z) = {mine[0], mine[1]};
          else if (column < g.columns)
            *z = mine[0];
        }
      }
  }

 private:
  int row_, column_;
  float total_[4][4][4] = {};
};

template <class T>
__global__ void __launch_bounds__(kProductThreads, 1) product_kernel(const Product<T> g) {
  DISTAYA_DYNAMIC_SHARED(char, shared);
  Feed<T> feed(g, shared);
  WarpProduct<T> part;
  const int slices = static_cast<int>(cuda::ceil_div<int64_t>(g.hidden, kDepth));
  const auto fetch = [&](int slice) {
    if (slice < slices) feed.copy(slice % kRing);
    ptx::copy_commit();
  };
#pragma unroll
  for (int s = 0; s < kRing - 1; ++s) fetch(s);
#pragma unroll 1
  for (int s = 0; s < slices; ++s) {
    ptx::copy_wait<kRing - 2>();
    __syncthreads();  // slice s is there for all, and all are done with slice s - 1
    fetch(s + kRing - 1);
    part.add(shared + s % kRing * kStageBytes);
  }
  part.store(g);
}

template <class T>
void multiply(const Product<T>& g, cudaStream_t stream) {
  cuda::need_shared(&product_kernel<T>, kProductShared);
  const dim3 grid(static_cast<unsigned>(cuda::ceil_div<int64_t>(g.rows, kTile)),
                  static_cast<unsigned>(cuda::ceil_div<int64_t>(g.columns, kTile)));
  cuda::launch(&product_kernel<T>, grid, kProductThreads, kProductShared, stream, g);
}

}  // namespace distaya::influence
