// Built-in device functions that are plain arithmetic.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

using std::max;
using std::min;

inline int __popc(unsigned x) { return std::popcount(x); }

inline int __popcll(unsigned long long x) { return std::popcount(x); }

inline int __ffs(int x) { return __builtin_ffs(x); }

inline int __ffsll(long long x) { return __builtin_ffsll(x); }

inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }

inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }

inline unsigned __brev(unsigned x) {
  unsigned out = 0;
  for (int i = 0; i < 32; ++i) out |= (x >> i & 1u) << (31 - i);
  return out;
}

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }

inline float __int_as_float(int x) { return std::bit_cast<float>(x); }

inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }

inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

inline float __fadd_rn(float a, float b) { return a + b; }

inline float __fsub_rn(float a, float b) { return a - b; }

inline float __fmul_rn(float a, float b) { return a * b; }

inline float __fdiv_rn(float a, float b) { return a / b; }

inline float __frcp_rn(float a) { return 1.f / a; }

inline float __fsqrt_rn(float a) { return std::sqrt(a); }

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

inline double __dadd_rn(double a, double b) { return a + b; }

inline double __dmul_rn(double a, double b) { return a * b; }

inline float __fdividef(float a, float b) { return a / b; }

inline float __expf(float x) { return std::exp(x); }

inline float __logf(float x) { return std::log(x); }

inline float __powf(float x, float y) { return std::pow(x, y); }

inline float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }

inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }

inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }

inline int __float2int_rz(float x) { return static_cast<int>(x); }

inline float __int2float_rn(int x) { return static_cast<float>(x); }

inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

using std::isfinite;
using std::isinf;
using std::isnan;

// Bytes 0..3 are x, 4..7 are y; nibble i of `pick` names byte i of the result, its top bit asks for
// the sign spread over the byte.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned pick) {
  const uint64_t both = uint64_t{y} << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = pick >> 4 * i;
    unsigned byte = static_cast<unsigned>(both >> 8 * (nibble & 7u)) & 0xffu;
    if (nibble & 8u) byte = byte & 0x80u ? 0xffu : 0u;
    out |= byte << 8 * i;
  }
  return out;
}

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (by & 31u));
}

inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) << (by & 31u) >> 32);
}

inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i)
    sum += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return sum;
}

// Loads with a hint to the caches are loads.
template <class T>
inline T __ldg(const T* p) {
  return *p;
}

template <class T>
inline T __ldcs(const T* p) {
  return *p;
}

template <class T>
inline T __ldcg(const T* p) {
  return *p;
}

template <class T>
inline void __stcs(T* p, const T& x) {
  *p = x;
}

template <class T>
inline void __stcg(T* p, const T& x) {
  *p = x;
}

inline size_t __cvta_generic_to_shared(const void* p) { return cuda_sim::shared_address(p); }
