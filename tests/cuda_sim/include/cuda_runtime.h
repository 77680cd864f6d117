// Stand-in for CUDA's header when the kernels are compiled for the simulator: the words of the
// language as macros, the built-in functions the kernels use, the part of the runtime they call.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "cuda_sim/api.h"

#define __host__
#define __device__
#define __global__
#define __constant__ static
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One block runs at a time, so a block's variables may be a thread's of the host. Their symbols
// then lie together, with names and sizes (image.h), and nothing else does.
#define __shared__ static thread_local

struct alignas(8) uint2 {
  unsigned x, y;
};

struct alignas(8) int2 {
  int x, y;
};

struct alignas(8) float2 {
  float x, y;
};

struct uint3 {
  unsigned x, y, z;
};

struct alignas(16) int4 {
  int x, y, z, w;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct alignas(16) double2 {
  double x, y;
};

struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};

struct dim3 {
  unsigned x, y, z;

  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

inline int2 make_int2(int x, int y) { return {x, y}; }

inline float2 make_float2(float x, float y) { return {x, y}; }

inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Objects whose members turn into numbers, since config.blockDim is a member's name as well.
template <unsigned of(int), int axis>
struct cuda_sim_axis {
  operator unsigned() const { return of(axis); }
};

template <unsigned of(int)>
struct cuda_sim_axes {
  cuda_sim_axis<of, 0> x;
  cuda_sim_axis<of, 1> y;
  cuda_sim_axis<of, 2> z;
};

inline constexpr cuda_sim_axes<cuda_sim::thread_index> threadIdx;
inline constexpr cuda_sim_axes<cuda_sim::block_index> blockIdx;
inline constexpr cuda_sim_axes<cuda_sim::block_size> blockDim;
inline constexpr cuda_sim_axes<cuda_sim::grid_size> gridDim;
inline constexpr int warpSize = 32;

// ---- barriers, votes, shuffles: the place of the call is part of every complaint ----

#define CUDA_SIM_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_SIM_PLACE) { cuda_sim::block_barrier({file, line}); }

inline int __syncthreads_or(int x, CUDA_SIM_PLACE) {
  return cuda_sim::block_count(x != 0, {file, line}) > 0;
}

inline int __syncthreads_and(int x, CUDA_SIM_PLACE) {
  return cuda_sim::block_count(x == 0, {file, line}) == 0;
}

inline int __syncthreads_count(int x, CUDA_SIM_PLACE) {
  return cuda_sim::block_count(x != 0, {file, line});
}

inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_SIM_PLACE) {
  cuda_sim::warp_barrier(mask, {file, line});
}

template <class T>
CUDA_SIM_PLAIN T cuda_sim_shuffle(const char* what, unsigned mask, T value, int from, int width,
                                  cuda_sim::Place place) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = cuda_sim::shuffle(what, mask, bits, from, width, place);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Lanes are taken in runs of `width`; a source outside of the run means the lane's own value.
template <class T>
CUDA_SIM_PLAIN T __shfl_sync(unsigned mask, T x, int from, int width = 32, CUDA_SIM_PLACE) {
  const int first = cuda_sim::lane() / width * width;
  return cuda_sim_shuffle("__shfl_sync", mask, x, first + (from & (width - 1)), width,
                          {file, line});
}

template <class T>
CUDA_SIM_PLAIN T __shfl_xor_sync(unsigned mask, T x, int with, int width = 32, CUDA_SIM_PLACE) {
  const int lane = cuda_sim::lane(), from = lane ^ with, end = (lane / width + 1) * width;
  return cuda_sim_shuffle("__shfl_xor_sync", mask, x, from < end ? from : lane, width,
                          {file, line});
}

template <class T>
CUDA_SIM_PLAIN T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32, CUDA_SIM_PLACE) {
  const int lane = cuda_sim::lane(), from = lane - static_cast<int>(by);
  return cuda_sim_shuffle("__shfl_up_sync", mask, x, from < lane / width * width ? lane : from,
                          width, {file, line});
}

template <class T>
CUDA_SIM_PLAIN T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32, CUDA_SIM_PLACE) {
  const int lane = cuda_sim::lane(), from = lane + static_cast<int>(by);
  return cuda_sim_shuffle("__shfl_down_sync", mask, x,
                          from >= (lane / width + 1) * width ? lane : from, width, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int x, CUDA_SIM_PLACE) {
  return cuda_sim::ballot("__ballot_sync", mask, x != 0, {file, line});
}

inline int __any_sync(unsigned mask, int x, CUDA_SIM_PLACE) {
  return cuda_sim::ballot("__any_sync", mask, x != 0, {file, line}) != 0;
}

inline int __all_sync(unsigned mask, int x, CUDA_SIM_PLACE) {
  return cuda_sim::ballot("__all_sync", mask, x != 0, {file, line}) == mask;
}

inline unsigned __match_any_sync(unsigned mask, unsigned long long x, CUDA_SIM_PLACE) {
  return cuda_sim::match(mask, x, {file, line});
}

inline unsigned __activemask() { return cuda_sim::living_lanes(); }

inline void __threadfence() {}

inline void __threadfence_block() {}

// ---- atomics: integers only, since sums of floats would depend on who comes first ----

template <class T, class F>
CUDA_SIM_PLAIN T cuda_sim_atomic(T* at, const F& change, cuda_sim::Place place) {
  static_assert(std::is_integral_v<T>, "the order of float atomics changes their result");
  cuda_sim::atomic_access(at, sizeof(T), place);
  const T before = *at;
  *at = change(before);
  return before;
}

#define CUDA_SIM_ATOMIC(name, result)                                                        \
  template <class T>                                                                         \
  CUDA_SIM_PLAIN T name(T* at, std::type_identity_t<T> x, CUDA_SIM_PLACE) {                  \
    return cuda_sim_atomic(at, [x](T old) { return static_cast<T>(result); }, {file, line}); \
  }
CUDA_SIM_ATOMIC(atomicAdd, old + x)
CUDA_SIM_ATOMIC(atomicSub, old - x)
CUDA_SIM_ATOMIC(atomicMin, old < x ? old : x)
CUDA_SIM_ATOMIC(atomicMax, old > x ? old : x)
CUDA_SIM_ATOMIC(atomicOr, old | x)
CUDA_SIM_ATOMIC(atomicAnd, old& x)
CUDA_SIM_ATOMIC(atomicXor, old ^ x)
CUDA_SIM_ATOMIC(atomicExch, (static_cast<void>(old), x))

template <class T>
CUDA_SIM_PLAIN T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> x,
                           CUDA_SIM_PLACE) {
  const auto change = [=](T old) { return old == expected ? x : old; };
  return cuda_sim_atomic(at, change, {file, line});
}

#include "cuda_sim/intrinsics.h"
#include "cuda_sim/runtime.h"
