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
DISTAYA_INLINE vf multiply_add(vf w, const float* x, vf acc) {
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
  // A float of a byte is made with 2^23 on top, which its zero then takes away.
  static constexpr bool kBiased =
      kLanes == 16 && (kSource == Source::wide || (kSource == Source::bytes && !kPairs));
  static constexpr int kWords = words_of(kPairs, kColumns);  // operands of a word of codes
  static constexpr int kSteps = 32 / kColumns;  // words of codes in a unit of 32 columns

  const uint32_t* words;

  const uint32_t* unit(int u) const { return words + u * kSteps * kTileRows; }

  // Word of a unit: of body order, or of decode_panel's.
  static constexpr int at(int step, int row) {
    if (kSource == Source::bytes) return step * kTileRows + row;
    return pack::word_of(step / 4, step % 4, row);
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
    if constexpr (kSource == Source::wide) {  // two exact floats, their upper halves
      const vf low = byte_of(w, 2 * i) - zero, high = byte_of(w, 2 * i + 1) - zero;
      return bits_to_float(float_to_bits(low) >> 16 | float_to_bits(high));
    }
    const __m512i codes =
        kSource == Source::nibbles
            ? (__m512i)((w >> (4 * i)) & 0x000f000fu)
            : _mm512_maskz_shuffle_epi8(0x5555555555555555, (__m512i)w, spread(i));
    return look_up16(_mm512_sub_epi16(codes, (__m512i)zero), d.table);
  }

  // Where bytes 2 i and 2 i + 1 of a lane go: to the low bytes of its halves.
  DISTAYA_INLINE __m512i spread(int i) {
    return _mm512_set4_epi32(0x0d000c00 + i * 0x02000200, 0x09000800 + i * 0x02000200,
                             0x05000400 + i * 0x02000200, 0x01000000 + i * 0x02000200);
  }

  // 2^23 + byte i of a lane, as a float: the byte is put under a fixed exponent.
  DISTAYA_INLINE vf byte_of(vu w, int i) {
    const __m512i from = _mm512_set4_epi32(12 + i, 8 + i, 4 + i, i);
    return (vf)_mm512_mask_shuffle_epi8(_mm512_set1_epi32(0x4b000000), 0x1111111111111111,
                                        (__m512i)w, from);
  }
#else
  explicit Decoder(const uint32_t* codes) : words(codes) {}
#endif

  // The zeros of kLanes rows as operand() wants them.
  DISTAYA_INLINE vf zero(const float* zeros) {
    const vf z = load(zeros);
    if constexpr (kBiased) return z + splat(0x1p23f);
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

// The record that is wanted two tiles from now, asked for by quarters: a core reaches the bandwidth
// of the memory only if it asks early, and across the 4 KB pages where the hardware stops.
struct Coming {
  const uint8_t* at = nullptr;
  int64_t bytes = 0;

  Coming(const Format& f, const uint8_t* buffer, int64_t row_tile, int64_t col_tile) {
    const int64_t last = f.tiles(), tile = std::min(last, row_tile * f.col_tiles() + col_tile + 2);
    const int64_t from = pack::record_at(f, buffer, 0, tile);
    at = buffer + from;
    bytes = pack::record_at(f, buffer, 0, std::min(last, tile + 1)) - from;
  }

  void prefetch(int64_t part, int64_t parts) const {
    for (int64_t i = part * bytes / parts; i < (part + 1) * bytes / parts; i += 64)
      __builtin_prefetch(at + i);
  }
};

// C [T][64] += scale * sum over a tile, codes straight into products. x [T][words of 128 columns].
// One sum is kept in kParts where there are too few to hide the latency of a product.
template <int T, Source kSource, bool kPairs>
void few_tokens(const Decoder<kSource, kPairs>& decoder, const ExactGrid& grid,
                const Coming& coming, const float* x, float* C) {
  using D = Decoder<kSource, kPairs>;
  constexpr int kX = words_of(kPairs, kTileCols), kWanted = kVectors == 4 ? 12 : 6;
  constexpr int kSplit = kVectors * T >= kWanted ? 1 : kVectors * T * 2 >= kWanted ? 2 : 4;
  constexpr int kParts = kSplit < D::kWords ? kSplit : D::kWords;
  const D d = decoder;
  const int units = 4 / grid.groups;
  for (int r0 = 0; r0 < kTileRows; r0 += kVectors * kLanes)
    for (int q = 0; q < grid.groups; ++q) {
      vf acc[kParts][T][kVectors] = {}, zero[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        zero[v] = D::zero(grid.zeros + q * kTileRows + r0 + v * kLanes);
      for (int u = q * units; u < (q + 1) * units; ++u) {
        if (r0 == 0) coming.prefetch(u, 4);
        const uint32_t* words = d.unit(u) + D::at(0, r0);
        const float* a = x + u * D::kSteps * D::kWords;
#pragma GCC unroll 8
        for (int s = 0; s < D::kSteps; ++s) {
          vu w[kVectors];
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) w[v] = load_words(words + D::at(s, v * kLanes));
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
                sum = multiply_add<kPairs>(b[v], a + t * kX + s * D::kWords + i, sum);
              }
          }
        }
      }
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          vf sum = acc[0][t][v];
#pragma GCC unroll 4
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
    const Coming coming(f, buffer, row_tile, c);
    if (x.tokens <= kInline) {
      with_constant<kInline>(
          t1 - t0, [&](auto n) { few_tokens<n.value>(decoder, grid, coming, x.at(c, t0), C); });
      continue;
    }
    fill_panel(decoder, grid, panel);
    const int64_t blocks = (t1 - t0 + kAcross - 1) / kAcross;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t t = t0 + i * kAcross;
      coming.prefetch(i, blocks);
      with_constant<kAcross>(std::min<int64_t>(kAcross, t1 - t), [&](auto n) {
        many_tokens<n.value, kPairs>(grid, panel, x.at(c, t), C + (t - t0) * kTileRows);
      });
    }
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
