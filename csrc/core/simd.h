// Vectors of kLanes floats, written once over GCC vector extensions: 16 lanes (AVX-512), 8 (AVX2)
// or 4 (portable, SSE2 on x86-64). No include guard: foreach_isa.h reads it once per instruction
// set. +, -, *, / and comparisons are the compiler's own; a comparison yields vi lanes of 0 or -1.

namespace distaya::DISTAYA_ISA {

inline constexpr int kLanes = DISTAYA_LANES;

#define DISTAYA_INLINE static inline __attribute__((always_inline, unused))

typedef float vf __attribute__((vector_size(DISTAYA_LANES * 4)));
typedef int32_t vi __attribute__((vector_size(DISTAYA_LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(DISTAYA_LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(DISTAYA_LANES * 2)));

// Unaligned, may alias anything: what an ordinary load and store need.
typedef float vf_any __attribute__((vector_size(DISTAYA_LANES * 4), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(DISTAYA_LANES * 2), aligned(2), may_alias));

DISTAYA_INLINE vf splat(float x) {  // not vf{} + x: that adds, and turns -0 into +0
#if DISTAYA_LANES == 16
  return (vf)_mm512_set1_ps(x);
#elif DISTAYA_LANES == 8
  return (vf)_mm256_set1_ps(x);
#else
  return vf{x, x, x, x};
#endif
}

DISTAYA_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }

DISTAYA_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }

DISTAYA_INLINE vf bits_to_float(vu x) { return (vf)x; }

DISTAYA_INLINE vu float_to_bits(vf x) { return (vu)x; }

// Widening loads of kLanes 16-bit floats: exact.
DISTAYA_INLINE vf load(const bf16* p) {
  const vh half = *reinterpret_cast<const vh_any*>(p);
  return bits_to_float(__builtin_convertvector(half, vu) << 16);
}

DISTAYA_INLINE vf load(const f16* p) {
#if DISTAYA_LANES == 16
  // maskz: the plain intrinsic trips gcc 12's -Wmaybe-uninitialized inside its own header.
  return (vf)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif DISTAYA_LANES == 8
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf x;
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

// Narrowing stores, round to nearest even.
DISTAYA_INLINE void store(bf16* p, vf x) {
  const vu u = float_to_bits(x);
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vi nan = (vi)((u & 0x7fffffffu) > 0x7f800000u);
  rounded = ((vu)nan & ((u >> 16) | 0x40u)) | (~(vu)nan & rounded);
  *reinterpret_cast<vh_any*>(p) = __builtin_convertvector(rounded, vh);
}

DISTAYA_INLINE void store(f16* p, vf x) {
#if DISTAYA_LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, (__m512)x, 0));
#elif DISTAYA_LANES == 8
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, 0));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<f16>(x[i]);
#endif
}

// First n < kLanes elements (the rest read as 0 / are left alone): tails of rows.
template <class T>
DISTAYA_INLINE vf load_n(const T* p, int64_t n) {
  T part[kLanes] = {};
  std::memcpy(part, p, static_cast<size_t>(n) * sizeof(T));
  return load(part);
}

template <class T>
DISTAYA_INLINE void store_n(T* p, vf x, int64_t n) {
  T part[kLanes];
  store(part, x);
  std::memcpy(p, part, static_cast<size_t>(n) * sizeof(T));
}

// a * b + c, fused where the instruction set has it.
DISTAYA_INLINE vf fma(vf a, vf b, vf c) {
#if DISTAYA_LANES == 16
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif DISTAYA_LANES == 8
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

DISTAYA_INLINE vf select(vi mask, vf yes, vf no) {
  return bits_to_float(((vu)mask & float_to_bits(yes)) | (~(vu)mask & float_to_bits(no)));
}

DISTAYA_INLINE vf abs(vf x) { return bits_to_float(float_to_bits(x) & 0x7fffffffu); }

DISTAYA_INLINE vf min(vf a, vf b) { return a < b ? a : b; }

DISTAYA_INLINE vf max(vf a, vf b) { return a > b ? a : b; }

// Round half to even, as torch.round does. Valid for |x| < 2^22 in the portable form (codes are
// tiny).
DISTAYA_INLINE vf round_even(vf x) {
#if DISTAYA_LANES == 16
  return (vf)_mm512_maskz_roundscale_ps(0xffff, (__m512)x,
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif DISTAYA_LANES == 8
  return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = std::nearbyintf(x[i]);
  return x;
#endif
}

DISTAYA_INLINE float sum(vf x) {  // fixed tree: same bits every time
  float part[kLanes];
  store(part, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}

}  // namespace distaya::DISTAYA_ISA
