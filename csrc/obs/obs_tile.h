// Textual part of obs_cpu.cpp: row-major blocks of a matrix <-> tiles [columns][kNR] whose lanes
// are rows, so that everything the sweep does to a column is a vector operation.

using DISTAYA_ISA::load;  // the overloads below would hide them
using DISTAYA_ISA::store;

// kLanes bytes as floats 0..255, and back (exact): masks and codes take the same road as weights.
typedef uint8_t vb __attribute__((vector_size(DISTAYA_LANES)));
typedef uint8_t vb_any __attribute__((vector_size(DISTAYA_LANES), aligned(1), may_alias));

DISTAYA_INLINE vf load(const uint8_t* p) {
  const vb bytes = *reinterpret_cast<const vb_any*>(p);
  return __builtin_convertvector(__builtin_convertvector(bytes, vi), vf);
}

DISTAYA_INLINE void store(uint8_t* p, vf x) {
  *reinterpret_cast<vb_any*>(p) = __builtin_convertvector(__builtin_convertvector(x, vi), vb);
}

// load_n of simd.h, for bytes too.
template <class T>
DISTAYA_INLINE vf load_part(const T* p, int64_t n) {
  T part[kLanes] = {};
  std::memcpy(part, p, static_cast<size_t>(n) * sizeof(T));
  return load(part);
}

// Exchanges the off-diagonal halves of every 2s x 2s sub-matrix held in x.
template <int s>
DISTAYA_INLINE void transpose_step(vf* x) {
  vi low, high;
  for (int l = 0; l < kLanes; ++l) {
    low[l] = l & s ? kLanes + l - s : l;
    high[l] = l & s ? kLanes + l : l + s;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & s)) {
      const vf a = x[i], b = x[i + s];
      x[i] = __builtin_shuffle(a, b, low);
      x[i + s] = __builtin_shuffle(a, b, high);
    }
}

DISTAYA_INLINE void transpose(vf* x) {
#if DISTAYA_LANES >= 16
  transpose_step<8>(x);
#endif
#if DISTAYA_LANES >= 8
  transpose_step<4>(x);
#endif
  transpose_step<2>(x);
  transpose_step<1>(x);
}

// src [rows <= kNR][cols] with row stride ld -> tile [cols_padded][kNR], zeros where src ends.
// From and To are float, bf16, f16 or uint8_t.
template <class From, class To>
void load_tile(const From* src, int64_t ld, int64_t rows, int64_t cols, int64_t cols_padded,
               To* tile) {
  for (int64_t v = 0; v < kNR; v += kLanes)
    for (int64_t j = 0; j < cols_padded; j += kLanes) {
      const int64_t height = std::clamp<int64_t>(rows - v, 0, kLanes);
      const int64_t width = std::clamp<int64_t>(cols - j, 0, kLanes);
      vf x[kLanes] = {};
      const From* from = src + v * ld + j;
      if (width == kLanes && height == kLanes) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) x[i] = load(from + i * ld);
      } else if (width > 0) {
        for (int64_t i = 0; i < height; ++i) x[i] = load_part(from + i * ld, width);
      }
      transpose(x);
      const int64_t n = std::min<int64_t>(kLanes, cols_padded - j);
      for (int64_t i = 0; i < n; ++i) store(tile + (j + i) * kNR + v, x[i]);
    }
}

// The way back: tile [cols][kNR] -> dst [rows <= kNR][cols]. Rows of W are often a power of two
// apart, so that their lines fight for the same cache sets: each line is written once, as a whole.
template <class From, class To>
void store_tile(const From* tile, int64_t rows, int64_t cols, To* dst, int64_t ld) {
  constexpr int64_t kLine = std::max<int64_t>(kLanes, 64 / sizeof(To));
  for (int64_t v = 0; v < rows; v += kLanes)
    for (int64_t j = 0; j < cols; j += kLine) {
      alignas(64) To line[kLanes][kLine];
      const int64_t height = std::min<int64_t>(rows - v, kLanes);
      const int64_t width = std::min<int64_t>(cols - j, kLine);
      for (int64_t c = 0; c < width; c += kLanes) {
        vf x[kLanes] = {};
        const From* from = tile + (j + c) * kNR + v;
        if (width - c >= kLanes) {
#pragma GCC unroll 16
          for (int64_t i = 0; i < kLanes; ++i) x[i] = load(from + i * kNR);
        } else {
          for (int64_t i = 0; i < width - c; ++i) x[i] = load(from + i * kNR);
        }
        transpose(x);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) store(line[i] + c, x[i]);
      }
      To* to = dst + v * ld + j;
      if (width == kLine)
        for (int64_t i = 0; i < height; ++i) std::memcpy(to + i * ld, line[i], sizeof line[i]);
      else
        for (int64_t i = 0; i < height; ++i)
          std::memcpy(to + i * ld, line[i], sizeof(To) * static_cast<size_t>(width));
    }
}
