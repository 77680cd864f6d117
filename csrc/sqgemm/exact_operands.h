// Textual part of sqgemm_cpu.cpp: operands of the exact kernels.
//
// Both operands are rows of 32-bit words: one fp32 value, or two neighbouring bf16 values where the
// CPU multiplies such pairs (AVX512-BF16, bf16 inputs); code - zero is exact in either. Sums of
// scale-free products run over a group of columns, then meet the scale.

namespace exact {

// Words of `columns` columns.
constexpr int words_of(bool pairs, int columns) { return pairs ? columns / 2 : columns; }

// The activations of a call, [col tile][token][words of 128 columns], padded with 0.
struct Activations {
  bool pairs;
  bool turned;  // pairs of columns 0 2 | 1 3 of each 4, as Decoder wants them for bytes
  int64_t tokens;
  cpu::Scratch<float> data;

  explicit Activations(const Problem& p)
      : pairs(kLanes == 16 && p.dtype == Dtype::bf16), tokens(p.tokens) {
    const Format& f = p.format;
    turned = pairs && f.kind != Kind::int4 && f.kind != Kind::int8;
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
      if (turned)
        for (int k = 0; k < kTileCols; k += 4) std::swap(part[k + 1], part[k + 2]);
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
  static constexpr bool kInPairs = kPairs;
  static constexpr int kTileWords = words_of(kPairs, kTileCols);
  static constexpr int kSteps = 32 / kColumns;  // words of codes in a unit of 32 columns

  const uint32_t* words = nullptr;

  const uint32_t* unit(int u) const { return words + u * kSteps * kTileRows; }

  // Word of a unit: of body order, or of decode_panel's.
  static constexpr int at(int step, int row) {
    if (kSource == Source::bytes) return step * kTileRows + row;
    return pack::word_of(step / 4, step % 4, row);
  }

#if DISTAYA_LANES == 16
  __m512i table;  // code - zero, of 32 bf16 values or 16 fp32 values

  Decoder() {
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
    if constexpr (kSource == Source::nibbles) {
      const vu codes = (w >> (4 * i)) & 0x000f000fu;
      return look_up16(_mm512_sub_epi16((__m512i)codes, (__m512i)zero), d.table);
    }
    // bytes: the lower ones of both halves, which are columns i and i + 2
    const vu value = (vu)_mm512_sub_epi8((__m512i)w, (__m512i)zero);
    return look_up16((__m512i)(value >> (8 * i)), d.table);
  }

  // 2^23 + byte i of a lane, as a float: the byte is put under a fixed exponent.
  DISTAYA_INLINE vf byte_of(vu w, int i) {
    const __m512i from = _mm512_set4_epi32(12 + i, 8 + i, 4 + i, i);
    return (vf)_mm512_mask_shuffle_epi8(_mm512_set1_epi32(0x4b000000), 0x1111111111111111,
                                        (__m512i)w, from);
  }
#endif

  // The zeros of kLanes rows as operand() wants them.
  DISTAYA_INLINE vf zero(const float* zeros) {
    const vf z = load(zeros);
    if constexpr (kBiased) return z + splat(0x1p23f);
    if constexpr (!kPairs) return z;
    const vu code = (vu) __builtin_convertvector(z, vi);
    return bits_to_float(code * (kSource == Source::bytes ? 0x01010101u : 0x00010001u));
  }

  // Operand i of a word of codes: column i of its columns, or columns 2 i and 2 i + 1 (of bytes i
  // and i + 2: Activations::turned).
  DISTAYA_INLINE vf operand(const Decoder& d, vu w, int i, vf zero) {
#if DISTAYA_LANES == 16
    if constexpr (kPairs) return pair(d, w, i, zero);
#endif
    const int shift = kNibbles ? 4 * (i / 2 + 4 * (i % 2)) : 8 * i;
#if DISTAYA_LANES == 16
    if constexpr (kSource == Source::symmetric) return look_up32((__m512i)(w >> shift), d.table);
    if constexpr (!kNibbles) return byte_of(w, i) - zero;
#endif
    (void)d;
    const vu code = (w >> shift) & (kNibbles ? 15u : 255u);
    return __builtin_convertvector((vi)code, vf) - zero;
  }
};

DISTAYA_INLINE vu load_words(const uint32_t* p) {
  return float_to_bits(load(reinterpret_cast<const float*>(p)));
}

}  // namespace exact
