// Host bodies of core/ptx.cuh, whose comments say what each does. Places and rules: the engine's.
#pragma once

#include "cuda_sim/api.h"

namespace distaya::ptx {

#define CUDA_SIM_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

template <class T>
inline constexpr cuda_sim::Shape sixteen_bit{dtype_of<T> == Dtype::bf16, false, false, 0};

template <class T, int selector>
inline constexpr cuda_sim::Shape sparse_sixteen_bit{dtype_of<T> == Dtype::bf16, false, true,
                                                    selector};

template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, CUDA_SIM_HERE) {
  const uint32_t b[2] = {b0, b1};
  cuda_sim::multiply(sixteen_bit<T>, d, a, b, 2, 0, {file, line});
}

template <class T, int selector>
inline void mma_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t meta,
                       CUDA_SIM_HERE) {
  cuda_sim::multiply(sparse_sixteen_bit<T, selector>, d, a, b, 4, meta, {file, line});
}

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     CUDA_SIM_HERE) {
  const uint32_t b[2] = {b0, b1};
  cuda_sim::multiply({false, true, false, 0}, d, a, b, 2, 0, {file, line});
}

inline void load_matrices(uint32_t (&out)[4], const void* row, CUDA_SIM_HERE) {
  cuda_sim::load_matrices(out, row, false, {file, line});
}

inline void load_transposed(uint32_t (&out)[4], const void* row, CUDA_SIM_HERE) {
  cuda_sim::load_matrices(out, row, true, {file, line});
}

// Of two packed 16-bit floats, each rounded once.
template <class T, class F>
inline uint32_t by_halves(uint32_t a, uint32_t b, const F& f) {
  uint32_t out = 0;
  for (int half = 0; half < 2; ++half) {
    const T x{static_cast<uint16_t>(a >> 16 * half)}, y{static_cast<uint16_t>(b >> 16 * half)};
    out |= uint32_t{from_float<T>(f(to_float(x), to_float(y))).bits} << 16 * half;
  }
  return out;
}

template <uint32_t mask>
inline uint32_t and_or(uint32_t a, uint32_t b) {
  return (a & mask) | b;
}

template <class T>
inline uint32_t add2(uint32_t a, uint32_t b) {  // exact in float, or far above any rounding
  return by_halves<T>(a, b, [](float x, float y) { return x + y; });
}

template <class T>
inline uint32_t multiply2(uint32_t a, uint32_t b) {
  return by_halves<T>(a, b, [](float x, float y) { return x * y; });
}

inline uint32_t pack_bf16(float low, float high) {
  return cuda_sim::float_to_bf16(low) | uint32_t{cuda_sim::float_to_bf16(high)} << 16;
}

inline uint64_t evict_first() { return 0; }

inline void copy_async(void* shared, const void* global, uint64_t, CUDA_SIM_HERE) {
  cuda_sim::copy_async(shared, global, 16, 16, {file, line});
}

inline void copy_async_part(void* shared, const void* global, int bytes, CUDA_SIM_HERE) {
  cuda_sim::copy_async(shared, global, 16, bytes, {file, line});
}

inline void copy_async_or_zero(void* shared, const void* global, bool there, CUDA_SIM_HERE) {
  cuda_sim::copy_async(shared, global, 16, there ? 16 : 0, {file, line});
}

inline void copy_async_word(void* shared, const void* global, bool there, CUDA_SIM_HERE) {
  cuda_sim::copy_async(shared, global, 4, there ? 4 : 0, {file, line});
}

inline void copy_commit() { cuda_sim::copy_commit(); }

template <int pending>
inline void copy_wait() {
  cuda_sim::copy_wait(pending);
}

inline unsigned thread_anew() { return threadIdx.x; }

inline void prefetch(const void*) {}

inline void wait_for_earlier() { cuda_sim::wait_for_earlier(); }

inline void let_later_start() {}  // what may start is told by the launch

inline void fence_for_products() { cuda_sim::fence_for_products(); }

inline void product_fence() { cuda_sim::product_fence(); }

inline void product_commit() { cuda_sim::product_commit(); }

template <int pending>
inline void product_wait() {
  cuda_sim::product_wait(pending);
}

inline uint64_t operand_b(const void* at) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(at));
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 |
         static_cast<uint64_t>((from & 0x3ffffu) >> 4);
}

template <int m>
inline void product_operand(uint32_t (&)[m]) {}  // these two hold a compiler back, no thread

template <int m>
inline void product_done(float (&)[m]) {}

template <class T, int n>
inline void wgmma(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, bool add, CUDA_SIM_HERE) {
  cuda_sim::product_issue(sixteen_bit<T>, n, d, a, b, 0, add, {file, line});
}

template <class T, int n, int selector>
inline void wgmma_sparse(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, uint32_t meta,
                         bool add, CUDA_SIM_HERE) {
  cuda_sim::product_issue(sparse_sixteen_bit<T, selector>, n, d, a, b, meta, add, {file, line});
}

#undef CUDA_SIM_HERE

}  // namespace distaya::ptx
