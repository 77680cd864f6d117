// Products of one warpgroup: A [64, 32] B [32, 16] in two steps, and 2:4 with 64 columns of A;
// right or with one bug. B comes as [16][64] 16-bit elements, rows of 128 bytes.
#include <stdexcept>
#include <string>

#include "core/cuda.cuh"
#include "core/ptx.cuh"
#include "cuda_sim/memory.h"

namespace distaya::planted {
namespace {

constexpr int kTokens = 16, kKept = 32;  // columns of D; stored columns of A

enum Bug {
  none,
  no_fence,
  no_barrier,
  no_product_fence,
  overwrites,
  reads_early,
  warps_differ,
  writes_a
};

struct Given {
  const uint16_t* a;     // [64][32]
  const uint16_t* b;     // [16][64]
  const uint32_t* meta;  // [2][128] of each step and thread
  float* d;              // [64][16]
  int bug;
};

__device__ void load_a(uint32_t (&out)[4], const uint16_t* a, int step) {
  const int t = threadIdx.x, g = t % 32 / 4, c = t % 4, row = t / 32 * 16 + g;
  for (int r = 0; r < 4; ++r) {
    const int i = row + r % 2 * 8, k = 16 * step + r / 2 * 8 + 2 * c;
    out[r] = a[i * kKept + k] | uint32_t{a[i * kKept + k + 1]} << 16;
  }
}

// Chunk c of row r lies where operand_b looks for it.
__device__ void stage_b(uint8_t* to, const uint16_t* b) {
  const int r = threadIdx.x / 8, chunk = threadIdx.x % 8;
  ptx::copy_async(to + r * 128 + 16 * (chunk ^ r % 8), b + r * 64 + 8 * chunk, ptx::evict_first());
  ptx::copy_commit();
  ptx::copy_wait<0>();
}

template <bool sparse>
__global__ void product(Given p) {
  DISTAYA_DYNAMIC_SHARED(uint8_t, shared);
  stage_b(shared, p.b);
  if (p.bug != no_fence) ptx::fence_for_products();
  if (p.bug != no_barrier) __syncthreads();
  float d[kTokens / 2];
  uint32_t a[2][4];
  for (int step = 0; step < 2; ++step) load_a(a[step], p.a, step);
  if (p.bug != no_product_fence) ptx::product_fence();
  for (int step = 0; step < 2; ++step) {
    const int other = p.bug == warps_differ && threadIdx.x >= 64 ? 1 - step : step;
    const uint64_t b = ptx::operand_b(shared + (sparse ? 64 : 32) * other);
    const uint32_t meta = p.meta[128 * step + threadIdx.x];
    if constexpr (!sparse)
      ptx::wgmma<bf16, kTokens>(d, a[step], b, step > 0);
    else if (step == 0)
      ptx::wgmma_sparse<bf16, kTokens, 0>(d, a[step], b, meta, false);
    else
      ptx::wgmma_sparse<bf16, kTokens, 1>(d, a[step], b, meta, true);
  }
  ptx::product_commit();
  if (p.bug == overwrites) shared[16 * threadIdx.x] = 0;
  if (p.bug == writes_a) a[1][2] ^= 1;
  float early = p.bug == reads_early ? d[0] : 0.f;
  ptx::product_wait<0>();
  const int t = threadIdx.x, g = t % 32 / 4, c = t % 4, row = t / 32 * 16 + g;
  for (int i = 0; i < kTokens / 8; ++i)
    for (int e = 0; e < 4; ++e)
      p.d[(row + e / 2 * 8) * kTokens + 8 * i + 2 * c + e % 2] = d[4 * i + e] + early;
}

std::string said;

}  // namespace
}  // namespace distaya::planted

extern "C" __attribute__((visibility("default"))) const char* run_products(
    const uint16_t* a, const uint16_t* b, const uint32_t* meta, float* d, int sparse, int bug) {
  using namespace distaya::planted;
  cuda_sim::admit(a, 64 * kKept * 2, "A");
  cuda_sim::admit(b, kTokens * 64 * 2, "B");
  cuda_sim::admit(meta, 256 * 4, "metadata");
  cuda_sim::admit(d, 64 * kTokens * 4, "D");
  try {
    distaya::cuda::launch(sparse ? product<true> : product<false>, 1, 128, kTokens * 128, nullptr,
                          Given{a, b, meta, d, bug});
  } catch (const std::exception& error) {
    said = error.what();
    return said.c_str();
  }
  return nullptr;
}
