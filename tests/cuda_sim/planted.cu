// Small kernels, each right or with one bug planted, for the tests of the simulator itself.
// in and out are 1024 floats; a kernel's `bug` says which version runs.
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>

#include "core/cuda.cuh"
#include "core/ptx.cuh"
#include "cuda_sim/memory.h"

namespace distaya::planted {
namespace {

using cuda::launch;
using ptx::copy_commit;
using ptx::copy_wait;

constexpr int kThreads = 128, kFloats = 1024;

struct Given {
  const float* in;
  float* out;
  bool bug;
};

// ---- barriers ----

__global__ void block_race(Given p) {
  __shared__ float x[kThreads];
  const int t = threadIdx.x;
  x[t] = p.in[t];
  if (!p.bug) __syncthreads();
  p.out[t] = x[kThreads - 1 - t];
}

__global__ void overwrite_race(Given p) {
  __shared__ float x[kThreads];
  const int t = threadIdx.x;
  for (int i = 0; i < 2; ++i) {
    x[t] = p.in[i * kThreads + t];
    __syncthreads();
    p.out[i * kThreads + t] = x[kThreads - 1 - t];
    if (!p.bug) __syncthreads();
  }
}

__global__ void warp_race(Given p) {
  __shared__ float x[kThreads];
  const int t = threadIdx.x;
  x[t] = p.in[t];
  if (!p.bug) __syncwarp();
  p.out[t] = x[t ^ 1];
}

__global__ void shuffle_orders_no_memory(Given p) {
  __shared__ float x[kThreads];
  const int t = threadIdx.x;
  x[t] = p.in[t];
  const float mine = __shfl_sync(cuda::kFullWarp, p.in[t], 0);
  if (!p.bug) __syncwarp();
  p.out[t] = x[t ^ 1] + mine;
}

__global__ void atomic_race(Given p) {
  __shared__ int sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  if (p.bug && threadIdx.x == 5)
    sum = 1;
  else
    atomicAdd(&sum, 1);
  __syncthreads();
  p.out[threadIdx.x] = static_cast<float>(sum);
}

__global__ void two_blocks_write(Given p) {
  const int64_t at = p.bug ? threadIdx.x : blockIdx.x * kThreads + threadIdx.x;
  p.out[at] = p.in[threadIdx.x];
}

__global__ void block_reads_another(Given p) {
  const int t = threadIdx.x, mine = blockIdx.x * kThreads + t;
  const int64_t from = p.bug ? (blockIdx.x ^ 1u) * kThreads + t : mine;
  p.out[mine] = p.in[t];
  p.out[mine] += p.out[from];
}

__global__ void waits_for_another_block(Given p) {
  const volatile float* flag = p.out;
  if (p.bug)
    while (*flag != 5) {
    }
  p.out[blockIdx.x * kThreads + threadIdx.x] = 1;
}

__global__ void divergent_barrier(Given p) {
  __shared__ float x[kThreads];
  const int t = threadIdx.x;
  x[t] = p.in[t];
  if (p.bug && t < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  p.out[t] = x[kThreads - 1 - t];
}

__global__ void deadlock(Given p) {
  const int t = threadIdx.x;
  if (p.bug && t < 16) __syncthreads();
  p.out[t] = __shfl_xor_sync(cuda::kFullWarp, p.in[t], 1);
}

__global__ void divergent_lanes(Given p) {
  const int t = threadIdx.x;
  if (p.bug && t == 3) __syncwarp();
  p.out[t] = __shfl_xor_sync(cuda::kFullWarp, p.in[t], 1);
}

__global__ void mask_without_caller(Given p) {
  const int t = threadIdx.x;
  p.out[t] = __shfl_xor_sync(p.bug ? 0xffffu : cuda::kFullWarp, p.in[t], 1);
}

__global__ void mask_with_ended_lanes(Given p) {
  const int t = threadIdx.x;
  if (t % 32 >= 16) return;
  p.out[t] = __shfl_xor_sync(p.bug ? cuda::kFullWarp : 0xffffu, p.in[t], 1);
}

__global__ void ends_while_waited_for(Given p) {
  const int t = threadIdx.x;
  if (p.bug && t == 31) return;
  p.out[t] = __shfl_xor_sync(cuda::kFullWarp, p.in[t], 1);
}

// ---- bounds ----

__global__ void shared_out_of_bounds(Given p) {
  __shared__ float x[kThreads];
  __shared__ float y[kThreads];
  const int t = threadIdx.x;
  x[p.bug ? t + 1 : t] = p.in[t];
  y[t] = 1;
  __syncthreads();
  p.out[t] = x[t > 0 ? t : 1] + y[t];
}

__global__ void dynamic_out_of_bounds(Given p) {
  DISTAYA_DYNAMIC_SHARED(float, x);
  x[threadIdx.x + p.bug] = p.in[threadIdx.x];
  __syncthreads();
  p.out[threadIdx.x] = x[kThreads - 1 - threadIdx.x];
}

__global__ void tensor_out_of_bounds(Given p) {
  p.out[threadIdx.x] = p.in[kFloats - kThreads + threadIdx.x + p.bug];
}

__global__ void unwritten(Given p) {
  __shared__ float x[kThreads];
  const int t = threadIdx.x;
  if (!p.bug || t != 7) x[t] = p.in[t];
  __syncthreads();
  p.out[t] = x[kThreads - 1 - t];
}

__global__ void misaligned_vector(Given p) {
  const auto v = *reinterpret_cast<const float4*>(p.in + 4 * threadIdx.x + p.bug);
  p.out[threadIdx.x] = v.x + v.w;
}

// ---- asynchronous copies ----

__global__ void copy_not_waited(Given p) {
  __shared__ __align__(16) float x[4 * kThreads];
  const int t = threadIdx.x;
  ptx::copy_async(x + 4 * t, p.in + 4 * t, ptx::evict_first());
  copy_commit();
  if (!p.bug) copy_wait<0>();
  p.out[t] = x[4 * t];
}

__global__ void copy_of_another_group(Given p) {  // waits for the older group only
  __shared__ __align__(16) float x[8 * kThreads];
  const int t = threadIdx.x;
  for (int i = 0; i < 2; ++i) {
    ptx::copy_async(x + 4 * (i * kThreads + t), p.in + 4 * t, ptx::evict_first());
    copy_commit();
  }
  copy_wait<1>();
  p.out[t] = x[4 * ((p.bug ? kThreads : 0) + t)];
}

__global__ void copy_without_barrier(Given p) {
  __shared__ __align__(16) float x[4 * kThreads];
  const int t = threadIdx.x;
  ptx::copy_async(x + 4 * t, p.in + 4 * t, ptx::evict_first());
  copy_commit();
  copy_wait<0>();
  if (!p.bug) __syncthreads();
  p.out[t] = x[4 * (kThreads - 1 - t)];
}

__global__ void copy_overwritten(Given p) {
  __shared__ __align__(16) float x[4 * kThreads];
  const int t = threadIdx.x;
  ptx::copy_async_or_zero(x + 4 * t, p.in + 4 * t, true);
  copy_commit();
  if (p.bug) x[4 * t] = 1;
  copy_wait<0>();
  p.out[t] = x[4 * t];
}

__global__ void misaligned_copy(Given p) {
  __shared__ __align__(16) float x[4 * kThreads];
  const int t = threadIdx.x;
  ptx::copy_async_part(x + 4 * t, p.in + 4 * t + (p.bug ? 2 : 0), 8);
  copy_commit();
  copy_wait<0>();
  p.out[t] = x[4 * t] + x[4 * t + 3];
}

// ---- early launches ----

__global__ void doubled(Given p) { p.out[threadIdx.x] = 2 * p.in[threadIdx.x]; }

__global__ void reads_too_early(Given p) {
  const int t = threadIdx.x;
  const float before = p.bug ? p.out[t] : p.in[t];
  ptx::wait_for_earlier();
  p.out[kThreads + t] = p.out[t] + before;
}

__global__ void writes_too_early(Given p) {
  const int t = threadIdx.x;
  if (p.bug) p.out[kThreads + t] = 0;
  ptx::wait_for_earlier();
  p.out[kThreads + t] = p.out[t];
}

__global__ void illegal_metadata(Given p) {
  const uint32_t a[4] = {}, b[4] = {};
  float d[4] = {};
  ptx::mma_sparse<bf16, 0>(d, a, b, p.bug ? 0x44444441u : 0x44444444u);
  p.out[threadIdx.x] = d[0] + 1;
}

template <class K>
void run(K* kernel, Given p, unsigned grid = 1, size_t shared = 0) {
  launch(kernel, grid, kThreads, shared, nullptr, p);
}

void early(void (*kernel)(Given), Given p) {
  run(doubled, p);
  launch<true>(kernel, 1, kThreads, 0, nullptr, p);
}

const std::map<std::string, void (*)(Given)> kKernels = {
#define PLAIN(name) {#name, [](Given p) { run(name, p); }}
    PLAIN(block_race),
    PLAIN(overwrite_race),
    PLAIN(warp_race),
    PLAIN(shuffle_orders_no_memory),
    PLAIN(atomic_race),
    {"two_blocks_write", [](Given p) { run(two_blocks_write, p, 2); }},
    {"block_reads_another", [](Given p) { run(block_reads_another, p, 2); }},
    {"waits_for_another_block", [](Given p) { run(waits_for_another_block, p, 2); }},
    PLAIN(divergent_barrier),
    PLAIN(deadlock),
    PLAIN(divergent_lanes),
    PLAIN(mask_without_caller),
    PLAIN(mask_with_ended_lanes),
    PLAIN(ends_while_waited_for),
    PLAIN(shared_out_of_bounds),
    {"dynamic_out_of_bounds",
     [](Given p) { run(dynamic_out_of_bounds, p, 1, kThreads * sizeof(float)); }},
    {"too_much_shared",
     [](Given p) { run(dynamic_out_of_bounds, p, 1, p.bug ? 49 << 10 : 48 << 10); }},
    PLAIN(tensor_out_of_bounds),
    PLAIN(unwritten),
    PLAIN(misaligned_vector),
    PLAIN(copy_not_waited),
    PLAIN(copy_of_another_group),
    PLAIN(copy_without_barrier),
    PLAIN(copy_overwritten),
    PLAIN(misaligned_copy),
    {"reads_too_early", [](Given p) { early(reads_too_early, p); }},
    {"writes_too_early", [](Given p) { early(writes_too_early, p); }},
    PLAIN(illegal_metadata),
#undef PLAIN
};

std::string said;

}  // namespace
}  // namespace distaya::planted

#define EXPORT extern "C" __attribute__((visibility("default")))

// What the kernel was stopped for, or null.
EXPORT const char* run_planted(const char* name, const float* in, float* out, int bug) {
  using namespace distaya::planted;
  cuda_sim::admit(in, kFloats * sizeof(float), "in");
  cuda_sim::admit(out, kFloats * sizeof(float), "out");
  try {
    kKernels.at(name)({in, out, bug != 0});
  } catch (const std::exception& error) {
    said = error.what();
    return said.c_str();
  }
  return nullptr;
}

EXPORT const char* planted_names() {
  auto& said = distaya::planted::said;
  said.clear();
  for (const auto& [name, call] : distaya::planted::kKernels) said += name + " ";
  return said.c_str();
}
