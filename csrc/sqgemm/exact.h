// Textual part of sqgemm_cpu.cpp: 64 rows of y = x W^T with activations in full precision.

namespace exact {

// Asks for one of `parts` of the body ahead.
DISTAYA_INLINE void ask_part(const Ahead& next, int64_t part, int64_t parts) {
  for (int64_t i = part * next.bytes / parts; i < (part + 1) * next.bytes / parts; i += 64)
    __builtin_prefetch(next.at + i);
}

// In how many parts a sum is kept where there are too few sums to hide the latency of a product.
constexpr int parts_of(int tokens, int words) {
  const int wanted = kVectors == 4 ? 12 : 6, sums = kVectors * tokens;
  return std::min(words, sums >= wanted ? 1 : 2 * sums >= wanted ? 2 : 4);
}

// acc += one word of codes of kVectors * kLanes rows times T tokens; a: its word of the first.
template <int T, int kParts, class D>
DISTAYA_INLINE void multiply_codes(const D& d, const vu* w, const vf* zero, const float* a,
                                   vf (&acc)[kParts][T][kVectors]) {
#pragma GCC unroll 8
  for (int i = 0; i < D::kWords; ++i) {
    vf b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) b[v] = D::operand(d, w[v], i, zero[v]);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        vf& sum = acc[i % kParts][t][v];
        sum = multiply_add<D::kInPairs>(b[v], a + t * D::kTileWords + i, sum);
      }
  }
}

// C [T][64] += scale * acc, from one row on.
template <int T, int kParts>
DISTAYA_INLINE void add_scaled(const vf (&acc)[kParts][T][kVectors], const float* scales,
                               float* C) {
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      vf sum = acc[0][t][v];
#pragma GCC unroll 4
      for (int part = 1; part < kParts; ++part) sum = sum + acc[part][t][v];
      float* c = C + t * kTileRows + v * kLanes;
      store(c, fma(load(scales + v * kLanes), sum, load(c)));
    }
}

// C [T][64] += scale * sum over a tile, codes straight into products. x [T][words of 128 columns].
template <int T, Source kSource, bool kPairs>
void few_tokens(const Decoder<kSource, kPairs>& decoder, const Grid& grid, const Ahead& next,
                const float* x, float* C) {
  using D = Decoder<kSource, kPairs>;
  const D d = decoder;
  const int units = 4 / grid.groups;
  for (int r0 = 0; r0 < kTileRows; r0 += kVectors * kLanes)
    for (int q = 0; q < grid.groups; ++q) {
      vf acc[parts_of(T, D::kWords)][T][kVectors] = {}, zero[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        zero[v] = D::zero(grid.zeros + q * kTileRows + r0 + v * kLanes);
      for (int u = q * units; u < (q + 1) * units; ++u) {
        if (r0 == 0) ask_part(next, u, 4);
        const uint32_t* words = d.unit(u) + D::at(0, r0);
        const float* a = x + u * D::kSteps * D::kWords;
#pragma GCC unroll 1
        for (int s = 0; s < D::kSteps; ++s) {
          vu w[kVectors];
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) w[v] = load_words(words + D::at(s, v * kLanes));
          multiply_codes<T>(d, w, zero, a + s * D::kWords, acc);
        }
      }
      add_scaled<T>(acc, grid.scales + q * kTileRows + r0, C + r0);
    }
}

// panel [words of 128 columns][64]: the operands of a tile, for many tokens.
template <Source kSource, bool kPairs>
void fill_panel(const Decoder<kSource, kPairs>& decoder, const Grid& grid, float* panel) {
  using D = Decoder<kSource, kPairs>;
  const D d = decoder;
  const int units = 4 / grid.groups;
  for (int q = 0; q < grid.groups; ++q)
    for (int r0 = 0; r0 < kTileRows; r0 += kVectors * kLanes) {
      vf zero[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        zero[v] = D::zero(grid.zeros + q * kTileRows + r0 + v * kLanes);
      for (int u = q * units; u < (q + 1) * units; ++u) {
        const uint32_t* words = d.unit(u) + D::at(0, r0);
        float* out = panel + u * D::kSteps * D::kWords * kTileRows + r0;
#pragma GCC unroll 8
        for (int s = 0; s < D::kSteps; ++s)
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            const vu w = load_words(words + D::at(s, v * kLanes));
#pragma GCC unroll 8
            for (int i = 0; i < D::kWords; ++i)
              store(out + (s * D::kWords + i) * kTileRows + v * kLanes,
                    D::operand(d, w, i, zero[v]));
          }
      }
    }
}

// C [T][64] += scale * (panel x^T) for T tokens.
template <int T, bool kPairs>
void many_tokens(const Grid& grid, const float* panel, const float* x, float* C) {
  constexpr int kX = words_of(kPairs, kTileCols);
  const int words = kX / grid.groups;
  for (int r = 0; r < kTileRows; r += kVectors * kLanes)
    for (int q = 0; q < grid.groups; ++q) {
      vf acc[T][kVectors] = {};
      const float* b = panel + q * words * kTileRows + r;
      const float* a = x + q * words;
#pragma GCC unroll 2
      for (int k = 0; k < words; ++k, b += kTileRows, ++a) {
        vf w[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) w[v] = load(b + v * kLanes);
#pragma GCC unroll 6
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v)
            acc[t][v] = multiply_add<kPairs>(w[v], a + t * kX, acc[t][v]);
      }
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          float* c = C + t * kTileRows + r + v * kLanes;
          store(c, fma(load(grid.scales + q * kTileRows + r + v * kLanes), acc[t][v], load(c)));
        }
    }
}

// body(std::integral_constant<int, n>) for 1 <= n <= kMost.
template <int kMost, class Body>
DISTAYA_INLINE void with_constant(int64_t n, const Body& body) {
  if constexpr (kMost > 1)
    if (n < kMost) return with_constant<kMost - 1>(n, body);
  body(std::integral_constant<int, kMost>{});
}

template <Source kSource, bool kPairs>
void tiles(const Format& f, const uint8_t* buffer, int64_t row_tile, const Activations& x,
           int64_t t0, int64_t t1, float* C) {
  alignas(64) uint8_t bytes[kSource == Source::bytes ? pack::kTileWeights : 1];
  alignas(64) float panel[words_of(kPairs, kTileCols) * kTileRows];
  Grid grid;
  grid.groups = std::max(1, f.tile_groups());
  Decoder<kSource, kPairs> decoder;
  for (int64_t c = 0; c < f.col_tiles(); ++c) {
    tile_grid(f, buffer, row_tile, c, grid.scales, grid.zeros);
    if (f.group == 0) std::fill_n(grid.scales, kTileRows, 1.0f);  // the row's comes at the end
    const Ahead next = ahead(f, buffer, row_tile * f.col_tiles() + c);
    const uint8_t* codes = bytes;
    if constexpr (kSource == Source::bytes)
      decode_panel(f, buffer, row_tile, c, bytes);
    else
      codes = buffer + pack::record_at(f, buffer, row_tile, c) + f.body_at();
    decoder.words = reinterpret_cast<const uint32_t*>(codes);
    if (x.tokens <= kInline) {
      with_constant<kInline>(
          t1 - t0, [&](auto n) { few_tokens<n.value>(decoder, grid, next, x.at(c, t0), C); });
      continue;
    }
    fill_panel(decoder, grid, panel);
    const int64_t blocks = (t1 - t0 + kAcross - 1) / kAcross;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t t = t0 + i * kAcross;
      ask_part(next, i, blocks);
      with_constant<kAcross>(std::min<int64_t>(kAcross, t1 - t), [&](auto n) {
        many_tokens<n.value, kPairs>(grid, panel, x.at(c, t), C + (t - t0) * kTileRows);
      });
    }
  }
}

template <bool kPairs>
void sums(const Format& f, const uint8_t* buffer, int64_t row_tile, const Activations& x,
          int64_t t0, int64_t t1, float* C) {
  switch (f.kind) {
    case Kind::int4:
      if (f.symmetric) return tiles<Source::symmetric, kPairs>(f, buffer, row_tile, x, t0, t1, C);
      return tiles<Source::nibbles, kPairs>(f, buffer, row_tile, x, t0, t1, C);
    case Kind::int8: return tiles<Source::wide, kPairs>(f, buffer, row_tile, x, t0, t1, C);
    default: return tiles<Source::bytes, kPairs>(f, buffer, row_tile, x, t0, t1, C);
  }
}

// C [t1 - t0][64] = X W^T for tokens [t0, t1) and the 64 rows of a row tile, over all columns.
inline void rows(const Format& f, const uint8_t* buffer, int64_t row_tile, const Activations& x,
                 int64_t t0, int64_t t1, float* C) {
  std::fill_n(C, (t1 - t0) * kTileRows, 0.0f);
  if (kLanes == 16 && x.pairs)
    sums<kLanes == 16>(f, buffer, row_tile, x, t0, t1, C);
  else
    sums<false>(f, buffer, row_tile, x, t0, t1, C);
  if (f.group) return;
  Grid grid;
  tile_grid(f, buffer, row_tile, 0, grid.scales, grid.zeros);
  for (int64_t i = 0; i < (t1 - t0) * kTileRows; i += kLanes)
    store(C + i, load(C + i) * load(grid.scales + i % kTileRows));
}

}  // namespace exact
