// What the product kernels share around a launch: permission for much shared memory, and the
// second pass that adds the sums of columns that were split among blocks.
#pragma once

#include <atomic>

#include "core/ptx.cuh"
#include "sqgemm/epilogue.cuh"

namespace distaya::sqgemm {

// Lets `kernel` have that much dynamic shared memory; asks once per device, for asking costs more
// than a launch.
template <auto kernel>
void allow_shared(int device, int bytes) {
  static std::atomic<uint64_t> allowed{0};  // a bit per device
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (allowed.load() & bit) return;
  cuda::check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  allowed.fetch_or(bit);
}

struct Splits {
  Output out;
  const float* partial;  // [splits][matrices][tokens][padded rows]
  int64_t splits, padded;
  int matrices;
};

inline constexpr int kAddThreads = 128;

// y from the splits, added in their order. A thread per row of a token; eight loads under way.
template <class T>
__global__ void __launch_bounds__(kAddThreads) add_splits_kernel(const __grid_constant__ Splits p) {
  ptx::let_later_start();
  ptx::wait_for_earlier();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x;
  if (row >= p.out.rows) return;
  const int64_t plane = p.out.tokens * p.padded;
  for (int64_t token = blockIdx.y; token < p.out.tokens; token += gridDim.y) {
    float total[2] = {};
    for (int m = 0; m < p.matrices; ++m) {
      const float* from = p.partial + m * plane + token * p.padded + row;
      for (int64_t first = 0; first < p.splits; first += 8) {
        float part[8];
#pragma unroll
        for (int i = 0; i < 8; ++i)
          part[i] = first + i < p.splits ? from[(first + i) * p.matrices * plane] : 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) total[m] += part[i];
      }
    }
    finish<T>(p.out, token, row, total[0], total[1]);
  }
}

template <class T>
void add_splits(const Splits& p, cudaStream_t stream) {
  const unsigned tokens = cuda::grid_of(p.out.tokens, 65535);
  const dim3 grid(cuda::grid_of(cuda::ceil_div<int64_t>(p.out.rows, kAddThreads)), tokens);
  cuda::launch<true>(add_splits_kernel<T>, grid, kAddThreads, 0, stream, p);
}

}  // namespace distaya::sqgemm
