// The element types we know, the two 16-bit floats as plain structs, and dispatch without macros.
#pragma once

#include <bit>
#include <cstdint>

#include "core/check.h"

#ifdef __CUDACC__
#define DISTAYA_HD __host__ __device__
#else
#define DISTAYA_HD
#endif

namespace distaya {

enum class Dtype : uint8_t { f32, f64, f16, bf16, i64, i32, i8, u8, boolean };

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

constexpr const char* name_of(Dtype d) {
  switch (d) {
    case Dtype::f32: return "float32";
    case Dtype::f64: return "float64";
    case Dtype::f16: return "float16";
    case Dtype::bf16: return "bfloat16";
    case Dtype::i64: return "int64";
    case Dtype::i32: return "int32";
    case Dtype::i8: return "int8";
    case Dtype::u8: return "uint8";
    default: return "bool";
  }
}

constexpr int64_t size_of(Dtype d) {
  switch (d) {
    case Dtype::f64:
    case Dtype::i64: return 8;
    case Dtype::f32:
    case Dtype::i32: return 4;
    case Dtype::f16:
    case Dtype::bf16: return 2;
    default: return 1;
  }
}

template <class T>
inline constexpr Dtype dtype_of = Dtype::f32;
template <>
inline constexpr Dtype dtype_of<double> = Dtype::f64;
template <>
inline constexpr Dtype dtype_of<f16> = Dtype::f16;
template <>
inline constexpr Dtype dtype_of<bf16> = Dtype::bf16;
template <>
inline constexpr Dtype dtype_of<int64_t> = Dtype::i64;
template <>
inline constexpr Dtype dtype_of<int32_t> = Dtype::i32;
template <>
inline constexpr Dtype dtype_of<int8_t> = Dtype::i8;
template <>
inline constexpr Dtype dtype_of<uint8_t> = Dtype::u8;
template <>
inline constexpr Dtype dtype_of<bool> = Dtype::boolean;

// dispatch<float, f16, bf16>(W.dtype, "W", [&]<class T>() { ... }) calls the body with the matching
// type.
template <class... Ts, class Body>
void dispatch(Dtype dtype, const char* name, Body&& body) {
  const bool found = ((dtype == dtype_of<Ts> && (body.template operator()<Ts>(), true)) || ...);
  if (!found) {
    std::string list;
    ((list += (list.empty() ? "" : ", "), list += name_of(dtype_of<Ts>)), ...);
    fail(name, " is ", name_of(dtype), " but must be one of ", list);
  }
}

// Scalar conversions, exact one way and round-to-nearest-even the other.
DISTAYA_HD inline float to_float(float x) { return x; }

DISTAYA_HD inline float to_float(bf16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
#ifdef __CUDA_ARCH__
  return __uint_as_float(u);
#else
  return std::bit_cast<float>(u);
#endif
}

inline float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1f, mantissa = x.bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t e = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>(sign | e << 23 | mantissa << 13);
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(u >> 16 | 0x40)};  // quiet NaN
  return {static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1)) >> 16)};
}

template <>
inline f16 from_float<f16>(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (a >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to >= 65520: Inf
  if (a < 0x38800000u) {  // subnormal: let one float addition do the rounding at 2^-24
    const float scaled = std::bit_cast<float>(a) + 0.5f;  // ulp of [0.5, 1) is 2^-24
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(scaled) - 0x3f000000u))};
  }
  return {static_cast<uint16_t>(sign | ((a - 0x38000000u + 0xfffu + (a >> 13 & 1)) >> 13))};
}

}  // namespace distaya
