// Textual part of sqgemm_cpu.cpp: activations as int8.
//
// Each block of a token's columns (the group of the weights, at most 128) has its own symmetric
// scale: scale = max |x| / 127, code = round(x / scale) half to even, so |x - scale * code| <=
// scale / 2. A block that is all zero has scale 0. A block with a NaN or an Inf has scale NaN and
// codes 0: every output of that token, and of no other, becomes NaN. (A block whose maximum is
// below 127 * 2^-126 has a subnormal scale, of few bits: codes are clamped, the error stays below
// 2^-142.)

struct Quantized {
  int64_t tokens = 0, col_tiles = 0, blocks = 0;  // blocks per tile of 128 columns
  cpu::Scratch<int8_t> values;                    // [col tile][token][128], padded with 0
  cpu::Scratch<int32_t> sums;                     // [col tile][token][blocks], of the codes
  cpu::Scratch<float> scales;                     // [col tile][token][blocks]
};

// The 4-bit decoder finds the columns of each 8 in this order, so the activations it meets are
// stored so.
DISTAYA_INLINE void interleave8(int8_t* codes) {
  typedef int8_t v16 __attribute__((vector_size(16)));
  const v16 order = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};
  for (int k = 0; k < kTileCols; k += 16) {
    v16 x;
    std::memcpy(&x, codes + k, sizeof x);
    x = __builtin_shuffle(x, order);
    std::memcpy(codes + k, &x, sizeof x);
  }
}

// One block: x [n] -> codes [n], and its scale and sum. n is a multiple of kLanes.
DISTAYA_INLINE void quantize_block(const float* x, int n, int8_t* codes, float* scale,
                                   int32_t* total) {
  typedef int8_t vc __attribute__((vector_size(DISTAYA_LANES), aligned(1), may_alias));
  vi largest = {};  // of the bits of |x|: an order that puts Inf and NaN on top
  for (int k = 0; k < n; k += kLanes) {
    const vi u = (vi)(float_to_bits(load(x + k)) & 0x7fffffffu);
    largest = u > largest ? u : largest;
  }
  int32_t most = 0;
  for (int l = 0; l < kLanes; ++l) most = std::max(most, largest[l]);
  *total = 0;
  if (most >= 0x7f800000) {
    *scale = std::bit_cast<float>(0x7fc00000);
    std::memset(codes, 0, static_cast<size_t>(n));
    return;
  }
  *scale = std::bit_cast<float>(most) / 127.0f;
  const vf divisor = splat(*scale == 0.0f ? 1.0f : *scale), limit = splat(127.0f);
  vi sums = {};
  for (int k = 0; k < n; k += kLanes) {
    const vf code = max(min(round_even(load(x + k) / divisor), limit), -limit);
    const vi c = __builtin_convertvector(code, vi);
    sums += c;
    *reinterpret_cast<vc*>(codes + k) = __builtin_convertvector(c, vc);
  }
  for (int l = 0; l < kLanes; ++l) *total += sums[l];
}

// 128 columns of one token: x [n], beyond it 0.
template <class T>
inline void quantize_tile(const T* x, int64_t n, int64_t blocks, bool interleave, int8_t* codes,
                          float* scales, int32_t* sums) {
  alignas(64) float wide[kTileCols] = {};
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) store(wide + k, load(x + k));
  for (int64_t k = whole; k < n; ++k) wide[k] = to_float(x[k]);
  const int width = static_cast<int>(kTileCols / blocks);
  for (int b = 0; b < blocks; ++b)
    quantize_block(wide + b * width, width, codes + b * width, scales + b, sums + b);
  if (interleave) interleave8(codes);
}

// x [tokens, cols] of dtype float, f16 or bf16 -> the activations of y = x W^T for W of format f.
inline void quantize_activations(const Format& f, const void* x, Dtype dtype, int64_t tokens,
                                 Quantized& out) {
  const int64_t tiles = f.col_tiles(), blocks = kTileCols / flush_columns(f);
  out.tokens = tokens, out.col_tiles = tiles, out.blocks = blocks;
  out.values = cpu::scratch<int8_t>(tiles * tokens * kTileCols);
  out.sums = cpu::scratch<int32_t>(tiles * tokens * blocks);
  out.scales = cpu::scratch<float>(tiles * tokens * blocks);
  const auto tile = [&]<class T>(int64_t token, int64_t t) {
    const int64_t at = t * tokens + token;
    quantize_tile(static_cast<const T*>(x) + token * f.cols + t * kTileCols,
                  std::min<int64_t>(kTileCols, f.cols - t * kTileCols), blocks,
                  f.kind == Kind::int4, out.values.get() + at * kTileCols,
                  out.scales.get() + at * blocks, out.sums.get() + at * blocks);
  };
  dispatch<float, f16, bf16>(dtype, "x", [&]<class T>() {
    constexpr int64_t kAlone = 1 << 15;  // elements a thread does before a second one could wake
    const auto token = [&](int64_t i) {
      for (int64_t t = 0; t < tiles; ++t) tile.template operator()<T>(i, t);
    };
    if (tokens * f.cols > kAlone && tokens > 1) return cpu::parallel_for(tokens, token);
    for (int64_t i = 0; i < tokens; ++i) token(i);
  });
}
