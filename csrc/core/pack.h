// Copies operands into the tiles the microkernel reads. No include guard: read once per
// instruction set, after simd.h.

#include <utility>

namespace distaya::DISTAYA_ISA {

// Lanes of the two halves of interleave(a, b) = a0 b0 a1 b1 ...
template <int kFrom, size_t... I>
DISTAYA_INLINE vf interleave(vf a, vf b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (kFrom + static_cast<int>(I / 2) + (I % 2 ? kLanes : 0))...);
}

// x becomes its transpose: log2(kLanes) rounds that interleave row i with row i + kLanes / 2.
DISTAYA_INLINE void transpose(vf (&x)[kLanes]) {
  constexpr std::make_index_sequence<kLanes> lanes{};
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    vf y[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i] = interleave<0>(x[i], x[i + kLanes / 2], lanes);
      y[2 * i + 1] = interleave<kLanes / 2>(x[i], x[i + kLanes / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
}

// A strip of `rows` <= kWidth rows and k columns of a strided matrix.
struct Strip {
  const float* data;
  int64_t row, col;  // strides
  int64_t rows, k;
};

// Rows [r0, r0 + kLanes) of a strip with unit column stride: blocks of kLanes columns are turned in
// registers.
template <int kWidth>
DISTAYA_INLINE void pack_turned(const Strip& s, int r0, float alpha, float* out) {
  constexpr int kStore = kWidth < kLanes ? kWidth : kLanes;
  const int64_t rows = std::min<int64_t>(s.rows - r0, kLanes);
  const int width = std::min(kWidth - r0, kStore);
  for (int64_t p = 0; p < s.k; p += kLanes) {
    const int64_t cols = std::min<int64_t>(kLanes, s.k - p);
    vf x[kLanes];
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) {
      const float* from = s.data + (r0 + r) * s.row + p;
      x[r] = r >= rows ? vf{} : cols == kLanes ? load(from) * alpha : load_n(from, cols) * alpha;
    }
    transpose(x);
    if (cols == kLanes && width == kStore) {
#pragma GCC unroll 16
      for (int q = 0; q < kLanes; ++q)
        std::memcpy(out + (p + q) * kWidth + r0, &x[q], kStore * sizeof(float));
    } else {
      for (int64_t q = 0; q < cols; ++q)
        std::memcpy(out + (p + q) * kWidth + r0, &x[q], static_cast<size_t>(width) * sizeof(float));
    }
  }
}

// out[p][r] = alpha * element (r, p), rows beyond the strip are zero. out holds k * kWidth floats.
template <int kWidth>
DISTAYA_INLINE void pack(const Strip& s, float alpha, float* out) {
  if (s.col == 1) {
    for (int r0 = 0; r0 < kWidth; r0 += kLanes) pack_turned<kWidth>(s, r0, alpha, out);
  } else if (s.row == 1 && s.rows == kWidth) {
    for (int64_t p = 0; p < s.k; ++p)
      for (int r = 0; r < kWidth; ++r) out[p * kWidth + r] = alpha * s.data[p * s.col + r];
  } else {
    for (int64_t p = 0; p < s.k; ++p)
      for (int64_t r = 0; r < kWidth; ++r)
        out[p * kWidth + r] = r < s.rows ? alpha * s.data[r * s.row + p * s.col] : 0.0f;
  }
}

}  // namespace distaya::DISTAYA_ISA
