// Textual part of sqgemm_cpu.cpp: 64 rows of y = x W^T with activations in full precision.
//
// Both operands are rows of 32-bit words: one fp32 value, or two neighbouring bf16 values where the
// CPU multiplies such pairs (AVX512-BF16, bf16 inputs); code - zero is exact in either. Sums of
// scale-free products run over a group of columns, then meet the scale.

// Words of `columns` columns.
constexpr int words_of(bool pairs, int columns) { return pairs ? columns / 2 : columns; }

// The activations of a call, [col tile][token][words of 128 columns], padded with 0.
struct Exact {
  bool pairs;
  int64_t tokens;
  cpu::Scratch<float> data;

  explicit Exact(const Problem& p)
      : pairs(kLanes == 16 && p.dtype == Dtype::bf16), tokens(p.tokens) {
    const Format& f = p.format;
    data = cpu::scratch<float>(f.col_tiles() * tokens * words_of(pairs, kTileCols));
    dispatch<float, f16, bf16>(p.dtype, "x", [&]<class T>() {
      constexpr int64_t kAlone = 1 << 15;  // elements worth waking a second thread for
      const int64_t step = std::max<int64_t>(1, kAlone / std::max<int64_t>(1, f.cols));
      cpu::parallel_for((tokens + step - 1) / step, [&](int64_t i) {
        for (int64_t t = i * step; t < std::min(tokens, (i + 1) * step); ++t)
          spread(f, static_cast<const T*>(p.x) + t * f.cols, t);
      });
    });
  }

  const float* at(int64_t col_tile, int64_t token) const {
    return data.get() + (col_tile * tokens + token) * words_of(pairs, kTileCols);
  }

 private:
  template <class T>
  void spread(const Format& f, const T* x, int64_t token) {
    for (int64_t c = 0; c < f.col_tiles(); ++c, x += kTileCols) {
      const int64_t n = std::min<int64_t>(kTileCols, f.cols - c * kTileCols);
      float* out = const_cast<float*>(at(c, token));
      alignas(64) T part[kTileCols] = {};
      std::memcpy(part, x, static_cast<size_t>(n) * sizeof(T));
      if (pairs || dtype_of<T> == Dtype::f32)
        std::memcpy(out, part, sizeof part);
      else
        for (int k = 0; k < kTileCols; k += kLanes) store(out + k, load(part + k));
    }
  }
};

// acc + w * (the word at x, for all lanes).
template <bool kPairs>
DISTAYA_INLINE vf dot(vf w, const float* x, vf acc) {
#if DISTAYA_LANES == 16
  if constexpr (kPairs) {
    int32_t word;
    std::memcpy(&word, x, sizeof word);
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(word), (__m512bh)w);
  }
#endif
  return fma(splat(*x), w, acc);
}

constexpr int kVectors = kLanes == 16 ? 4 : 2;  // of rows, in a register tile
constexpr int kAcross = kLanes == 4 ? 4 : 6;    // tokens of it
constexpr int kInline = 4;  // most tokens for which codes go straight into products

// What a tile's codes are read from, a step being the columns one 32-bit word holds.
enum class Source {
  symmetric,  // the body of an int4 tile whose zeros are all 8: 8 columns
  nibbles,    // the body of an int4 tile: 8 columns
  bytes,      // decode_panel's, codes below 16: 4 columns
  wide,       // the body of an int8 tile: 4 columns
};

#if DISTAYA_LANES == 16
// maskz: the plain intrinsics trip gcc 12's -Wmaybe-uninitialized inside their own header.
DISTAYA_INLINE vf look_up16(__m512i index, __m512i table) {
  return (vf)_mm512_maskz_permutexvar_epi16(0xffffffff, index, table);
}

DISTAYA_INLINE vf look_up32(__m512i index, __m512i table) {
  return (vf)_mm512_maskz_permutexvar_ps(0xffff, index, (__m512)table);
}
#endif

// Turns words of codes into operands. Tables, where there are vector look-ups: an index has as many
// bits as the table asks for, what stands above them in a lane is ignored.
template <Source kSource, bool kPairs>
struct Decoder {
  static constexpr bool kNibbles = kSource == Source::symmetric || kSource == Source::nibbles;
  static constexpr int kColumns = kNibbles ? 8 : 4;
  static constexpr int kWords = words_of(kPairs, kColumns);  // operands of a word of codes
  static constexpr int kSteps = kTileCols / kColumns;

  const uint32_t* words;

  const uint32_t* at(int step, int row) const {
    if constexpr (kSource == Source::bytes) return words + step * kTileRows + row;
    return words + pack::word_of(step / 4, step % 4, row);
  }

#if DISTAYA_LANES == 16
  __m512i table;  // code - zero, of 32 bf16 values or 16 fp32 values

  explicit Decoder(const uint32_t* codes) : words(codes) {
    alignas(64) uint16_t halves[32];
    alignas(64) float floats[16];
    for (int i = 0; i < 32; ++i) {
      const int value = kSource == Source::symmetric ? i % 16 - 8 : i < 16 ? i : i - 32;
      halves[i] = from_float<bf16>(static_cast<float>(value)).bits;
      floats[i % 16] = static_cast<float>(i % 16 - 8);
    }
    table = kPairs ? _mm512_load_si512(halves) : _mm512_load_si512(floats);
  }

  // Two neighbours' codes in the halves of a lane, minus their zero -> bf16.
  DISTAYA_INLINE vf pair(const Decoder& d, vu w, int i, vf zero) {
    if constexpr (kSource == Source::symmetric) return look_up16((__m512i)(w >> (4 * i)), d.table);
    if constexpr (kSource == Source::nibbles) w = (w >> (4 * i)) & 0x000f000fu;
    if constexpr (!kNibbles) {
      w = w >> (16 * i);
      w = (w & 0xffu) | ((w & 0xff00u) << 8);
    }
    const __m512i value = _mm512_sub_epi16((__m512i)w, (__m512i)zero);
    if constexpr (kSource != Source::wide) return look_up16(value, d.table);
    const vi low = (vi)value << 16 >> 16, high = (vi)value >> 16;  // |.| < 256: exact in bf16
    const vu a = float_to_bits(__builtin_convertvector(low, vf));
    const vu b = float_to_bits(__builtin_convertvector(high, vf));
    return bits_to_float(a >> 16 | b);
  }
#else
  explicit Decoder(const uint32_t* codes) : words(codes) {}
#endif

  // The zeros of kLanes rows as operand() wants them.
  DISTAYA_INLINE vf zero(const float* zeros) {
    const vf z = load(zeros);
    if constexpr (!kPairs) return z;
    const vu code = (vu) __builtin_convertvector(z, vi);
    return bits_to_float(code | code << 16);
  }

  // Operand i of a word of codes: column i of its columns, or columns 2 i and 2 i + 1.
  DISTAYA_INLINE vf operand(const Decoder& d, vu w, int i, vf zero) {
#if DISTAYA_LANES == 16
    if constexpr (kPairs) return pair(d, w, i, zero);
#endif
    const int shift = kNibbles ? 4 * (i / 2 + 4 * (i % 2)) : 8 * i;
#if DISTAYA_LANES == 16
    if constexpr (kSource == Source::symmetric) return look_up32((__m512i)(w >> shift), d.table);
#endif
    (void)d;
    const vu code = (w >> shift) & (kNibbles ? 15u : 255u);
    return __builtin_convertvector((vi)code, vf) - zero;
  }
};

DISTAYA_INLINE vu load_words(const uint32_t* p) {
  return float_to_bits(load(reinterpret_cast<const float*>(p)));
}

// Scales and zeros of a tile, [groups][64].
struct ExactGrid {
  alignas(64) float scales[4 * kTileRows];
  alignas(64) float zeros[4 * kTileRows];
  int groups;
};

// C [T][64] += scale * sum over a tile, codes straight into products. x [T][words of 128 columns].
// One sum is kept in kSplit parts where there are too few to hide the latency of a product.
template <int T, Source kSource, bool kPairs>
void few_tokens(const Decoder<kSource, kPairs>& decoder, const ExactGrid& grid, const float* x,
                float* C) {
  using D = Decoder<kSource, kPairs>;
  constexpr int kX = words_of(kPairs, kTileCols), kWanted = kVectors == 4 ? 12 : 6;
  constexpr int kSplit = kVectors * T >= kWanted ? 1 : kVectors * T * 2 >= kWanted ? 2 : 4;
  constexpr int kParts = kSplit < D::kWords ? kSplit : D::kWords;
  constexpr int kAhead = 4096;  // bytes: what memory needs to answer
  const D d = decoder;
  const int steps = D::kSteps / grid.groups;
  for (int r0 = 0; r0 < kTileRows; r0 += kVectors * kLanes)
    for (int q = 0; q < grid.groups; ++q) {
      vf acc[kParts][T][kVectors] = {}, zero[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        zero[v] = D::zero(grid.zeros + q * kTileRows + r0 + v * kLanes);
      for (int s = q * steps; s < (q + 1) * steps; ++s) {
        vu w[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const uint32_t* from = d.at(s, r0 + v * kLanes);
          w[v] = load_words(from);
          if constexpr (kSource != Source::bytes)
            __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead);
        }
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
              sum = dot<kPairs>(b[v], x + t * kX + s * D::kWords + i, sum);
            }
        }
      }
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          vf sum = acc[0][t][v];
          for (int part = 1; part < kParts; ++part) sum = sum + acc[part][t][v];
          const int r = r0 + v * kLanes;
          float* c = C + t * kTileRows + r;
          store(c, fma(load(grid.scales + q * kTileRows + r), sum, load(c)));
        }
    }
}

// panel [words of 128 columns][64]: the operands of a tile, for many tokens.
template <Source kSource, bool kPairs>
void fill_panel(const Decoder<kSource, kPairs>& decoder, const ExactGrid& grid, float* panel) {
  using D = Decoder<kSource, kPairs>;
  const D d = decoder;
  const int steps = D::kSteps / grid.groups;
  for (int q = 0; q < grid.groups; ++q)
    for (int r = 0; r < kTileRows; r += kLanes) {
      const vf zero = D::zero(grid.zeros + q * kTileRows + r);
      for (int s = q * steps; s < (q + 1) * steps; ++s) {
        const vu w = load_words(d.at(s, r));
        float* out = panel + s * D::kWords * kTileRows + r;
#pragma GCC unroll 8
        for (int i = 0; i < D::kWords; ++i) store(out + i * kTileRows, D::operand(d, w, i, zero));
      }
    }
}

// C [T][64] += scale * (panel x^T) for T tokens.
template <int T, bool kPairs>
void many_tokens(const ExactGrid& grid, const float* panel, const float* x, float* C) {
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
          for (int v = 0; v < kVectors; ++v) acc[t][v] = dot<kPairs>(w[v], a + t * kX, acc[t][v]);
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
void exact_tiles(const Format& f, const uint8_t* buffer, int64_t row_tile, const Exact& x,
                 int64_t t0, int64_t t1, float* C) {
  alignas(64) uint8_t bytes[kSource == Source::bytes ? pack::kTileWeights : 1];
  alignas(64) float panel[words_of(kPairs, kTileCols) * kTileRows];
  ExactGrid grid;
  grid.groups = std::max(1, f.tile_groups());
  for (int64_t c = 0; c < f.col_tiles(); ++c) {
    tile_grid(f, buffer, row_tile, c, grid.scales, grid.zeros);
    if (f.group == 0) std::fill_n(grid.scales, kTileRows, 1.0f);  // the row's comes at the end
    const uint8_t* codes = bytes;
    if constexpr (kSource == Source::bytes)
      decode_panel(f, buffer, row_tile, c, bytes);
    else
      codes = buffer + pack::record_at(f, buffer, row_tile, c) + f.body_at();
    const Decoder<kSource, kPairs> decoder(reinterpret_cast<const uint32_t*>(codes));
    if (x.tokens <= kInline) {
      with_constant<kInline>(t1 - t0,
                             [&](auto n) { few_tokens<n.value>(decoder, grid, x.at(c, t0), C); });
      continue;
    }
    fill_panel(decoder, grid, panel);
    for (int64_t t = t0; t < t1; t += kAcross)
      with_constant<kAcross>(std::min<int64_t>(kAcross, t1 - t), [&](auto n) {
        many_tokens<n.value, kPairs>(grid, panel, x.at(c, t), C + (t - t0) * kTileRows);
      });
  }
}

template <bool kPairs>
void exact_sums(const Format& f, const uint8_t* buffer, int64_t row_tile, const Exact& x,
                int64_t t0, int64_t t1, float* C) {
  switch (f.kind) {
    case Kind::int4:
      if (f.symmetric)
        return exact_tiles<Source::symmetric, kPairs>(f, buffer, row_tile, x, t0, t1, C);
      return exact_tiles<Source::nibbles, kPairs>(f, buffer, row_tile, x, t0, t1, C);
    case Kind::int8: return exact_tiles<Source::wide, kPairs>(f, buffer, row_tile, x, t0, t1, C);
    default: return exact_tiles<Source::bytes, kPairs>(f, buffer, row_tile, x, t0, t1, C);
  }
}

// C [t1 - t0][64] = X W^T for tokens [t0, t1) and the 64 rows of a row tile, over all columns.
inline void exact_rows(const Format& f, const uint8_t* buffer, int64_t row_tile, const Exact& x,
                       int64_t t0, int64_t t1, float* C) {
  std::fill_n(C, (t1 - t0) * kTileRows, 0.0f);
  if (kLanes == 16 && x.pairs)
    exact_sums<kLanes == 16>(f, buffer, row_tile, x, t0, t1, C);
  else
    exact_sums<false>(f, buffer, row_tile, x, t0, t1, C);
  if (f.group) return;
  ExactGrid grid;
  tile_grid(f, buffer, row_tile, 0, grid.scales, grid.zeros);
  for (int64_t i = 0; i < (t1 - t0) * kTileRows; i += kLanes)
    store(C + i, load(C + i) * load(grid.scales + i % kTileRows));
}
