// Scores as integers that sort like the scores, in vectors; how a cut becomes a mask and a NaN is
// reported. No include guard: read once per instruction set, after core/simd.h.

namespace distaya::DISTAYA_ISA {

typedef int32_t vi_any __attribute__((vector_size(DISTAYA_LANES * 4), aligned(4), may_alias));
typedef uint8_t vb __attribute__((vector_size(DISTAYA_LANES)));
typedef uint8_t vb_any __attribute__((vector_size(DISTAYA_LANES), aligned(1), may_alias));

inline constexpr int32_t kInfinity = 0x7f800000;  // any larger magnitude is a NaN

DISTAYA_INLINE vi magnitude(vf x) { return (vi)x & 0x7fffffff; }

// sign * magnitude: negative floats become negative integers, -0 becomes 0.
DISTAYA_INLINE vi ordered(vf x) {
  const vi sign = (vi)x >> 31;
  return (magnitude(x) ^ sign) - sign;
}

DISTAYA_INLINE int32_t magnitude(float x) { return std::bit_cast<int32_t>(x) & 0x7fffffff; }

DISTAYA_INLINE int32_t ordered(float x) { return std::signbit(x) ? -magnitude(x) : magnitude(x); }

DISTAYA_INLINE vi load_keys(const int32_t* p) { return *reinterpret_cast<const vi_any*>(p); }

DISTAYA_INLINE void store_keys(int32_t* p, vi x) { *reinterpret_cast<vi_any*>(p) = x; }

// A comparison's 0 / -1 lanes as mask bytes 0 / 1.
DISTAYA_INLINE void store_mask(uint8_t* p, vi keep) {
  *reinterpret_cast<vb_any*>(p) = __builtin_convertvector(keep & 1, vb);
}

DISTAYA_INLINE void store_mask_n(uint8_t* p, vi keep, int64_t n) {
  if (n == kLanes) return store_mask(p, keep);
  for (int64_t l = 0; l < n; ++l) p[l] = keep[l] & 1;
}

DISTAYA_INLINE bool any(vi x) {
#if DISTAYA_LANES == 16
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#elif DISTAYA_LANES == 8
  return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#else
  return (x[0] | x[1] | x[2] | x[3]) != 0;
#endif
}

// What stays of a group: every key above `above`, and the first `ties` keys equal to it.
struct Cut {
  int32_t above;
  int64_t ties;
};

inline void write_mask(const float* scores, int64_t n, const Cut& cut, uint8_t* mask) {
  const vi above = vi{} + cut.above;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store_mask(mask + j, ordered(load(scores + j)) > above);
  for (; j < n; ++j) mask[j] = ordered(scores[j]) > cut.above;
  for (int64_t left = cut.ties, i = 0; left > 0 && i < n; ++i)
    if (ordered(scores[i]) == cut.above) {
      mask[i] = 1;
      --left;
    }
}

// Lowers *bad (-1 = none, the largest unsigned) to the first NaN's index in scores[from, to).
// The minimum does not depend on which thread comes first.
inline void report_nan(const float* scores, int64_t from, int64_t to, int64_t* bad) {
  while (from < to && magnitude(scores[from]) <= kInfinity) ++from;
  if (from == to) return;
  std::atomic_ref<uint64_t> least(*reinterpret_cast<uint64_t*>(bad));
  uint64_t seen = least.load();
  while (static_cast<uint64_t>(from) < seen &&
         !least.compare_exchange_weak(seen, static_cast<uint64_t>(from))) {
  }
}

}  // namespace distaya::DISTAYA_ISA
