// Textual part of sqgemm_cpu.cpp, AVX-512 only: the codes of a tile in the order in which they lie,
// as operands of vpdpbusd. A unit is 32 columns of the tile; use(v, j, codes) is called for the rows
// 16 v .. 16 v + 15 and the columns 4 j .. 4 j + 3 of the unit, 32 times, all indices constant after
// inlining.

struct Codes {
  const uint8_t* body;
  const uint8_t* values;              // int4_mask, int4_out: the next chunk's
  const __m512i* zero;                // [4] the zero code of each row, in all four bytes of its word
  alignas(64) uint64_t present[128];  // int4_24: [64 columns][group][16 of 32 rows][half][quarter]
};

DISTAYA_INLINE __m512i load512(const void* p) { return _mm512_loadu_si512(p); }

DISTAYA_INLINE __m512i low_nibbles(__m512i x) {
  return _mm512_and_si512(x, _mm512_set1_epi8(0x0f));
}

DISTAYA_INLINE __m512i high_nibbles(__m512i x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }

// Metadata of int4_24 -> one bit per weight, as vpexpandb wants it. A nibble of metadata (two kept
// columns) becomes a nibble of four bits by a table; then the nibbles of two neighbouring rows share
// a byte, even quarters in the low and odd ones in the high half of a qword; then the eight bytes
// of a (half, quarter) move together.
DISTAYA_INLINE void presence(Codes& c) {
  // entry a | b << 2 = 1 << a | 1 << b
  const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12,
                                                             9, 10, 12, 8));
  alignas(64) static constexpr auto gather = [] {
    struct { uint8_t at[64]; } g{};
    for (int m = 0; m < 8; ++m)  // m = half * 4 + quarter
      for (int p = 0; p < 8; ++p)
        g.at[m * 8 + p] = static_cast<uint8_t>(p * 8 + m / 4 * 2 + m % 4 / 2 + 4 * (m % 2));
    return g;
  }();
  const __m512i order = load512(gather.at);
  const uint8_t* meta = c.body + pack::kTileWeights / 4;
#pragma GCC unroll 4
  for (int i = 0; i < 16; ++i) {
    const __m512i w = load512(meta + 64 * i);
    __m512i even = _mm512_shuffle_epi8(table, low_nibbles(w));
    __m512i odd = _mm512_shuffle_epi8(table, high_nibbles(w));
    even = _mm512_or_si512(even, _mm512_srli_epi64(even, 28));
    odd = _mm512_or_si512(odd, _mm512_srli_epi64(odd, 28));
    const __m512i both = _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA);
    _mm512_store_si512(c.present + 8 * i, _mm512_maskz_permutexvar_epi8(~0ull, order, both));
  }
}

DISTAYA_INLINE __m512i expand(__m512i zero, uint64_t mask, __m512i codes) {
  return _mm512_mask_expand_epi8(zero, mask, codes);
}

DISTAYA_INLINE __m512i upper_half(__m512i x) {
  return _mm512_zextsi256_si512(_mm512_extracti64x4_epi64(x, 1));
}

// natural: columns 0 1 2 3 | 4 5 6 7 of each 8; else as the nibbles lie, 0 4 1 5 | 2 6 3 7.
template <bool natural, class Use>
DISTAYA_INLINE void visit_int4(const Codes& c, int u, const Use& use) {
  alignas(64) static constexpr auto order = [] {
    struct { uint8_t at[2][64]; } g{};
    for (int i = 0; i < 64; ++i)  // bytes 0..63 of the low nibbles, 64.. of the high ones
      for (int j = 0; j < 2; ++j)
        g.at[j][i] = static_cast<uint8_t>(i / 4 * 4 + j + 2 * (i % 2) + 64 * (i % 4 / 2));
    return g;
  }();
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h)
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q)
#pragma GCC unroll 2
      for (int s = 0; s < 2; ++s) {
        const __m512i w = load512(c.body + ((u * 2 + h) * 4 + q) * 128 + s * 64);
        const __m512i low = low_nibbles(w), high = high_nibbles(w);
        if constexpr (natural) {
          use(2 * h + s, 2 * q, _mm512_permutex2var_epi8(low, load512(order.at[0]), high));
          use(2 * h + s, 2 * q + 1, _mm512_permutex2var_epi8(low, load512(order.at[1]), high));
        } else {
          use(2 * h + s, 2 * q, low);
          use(2 * h + s, 2 * q + 1, high);
        }
      }
}

template <class Use>
DISTAYA_INLINE void visit_int8(const Codes& c, int u, const Use& use) {
#pragma GCC unroll 2
  for (int b = 0; b < 2; ++b)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h)
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q)
#pragma GCC unroll 2
        for (int s = 0; s < 2; ++s)
          use(2 * h + s, 4 * b + q, load512(c.body + (((2 * u + b) * 2 + h) * 4 + q) * 128 + s * 64));
}

template <class Use>
DISTAYA_INLINE void visit_int3(const Codes& c, int u, const Use& use) {
  const __m512i low_bits = _mm512_set1_epi8(3), all_bits = _mm512_set1_epi8(7);
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h)
#pragma GCC unroll 2
    for (int s = 0; s < 2; ++s) {
      const __m512i third = load512(c.body + 2048 + (h * 4 + u) * 128 + s * 64);
#pragma GCC unroll 2
      for (int p = 0; p < 2; ++p) {
        const __m512i w =
            load512(c.body + ((u / 2 * 2 + h) * 4 + u % 2 * 2 + p) * 128 + s * 64);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const int at = 4 * p + i;  // bit of `third`
          const vu high = at < 2 ? (vu)third << (2 - at) : (vu)third >> (at - 2);
          // bits 0 and 1 of the one, bit 2 of the other
          const __m512i code = _mm512_ternarylogic_epi32(low_bits, (__m512i)((vu)w >> 2 * i),
                                                         (__m512i)high, 0xca);
          use(2 * h + s, at, _mm512_and_si512(code, all_bits));
        }
      }
    }
}

// A word holds 16 columns; its bytes in the order 0 2 | 1 3 are the kept pairs of groups 0 and 1 |
// 2 and 3, so after one vpermb each half of a vector is 16 rows of one group.
template <class Use>
DISTAYA_INLINE void visit_24(const Codes& c, int u, const Use& use) {
  alignas(64) static constexpr auto order = [] {
    struct { uint8_t at[64]; } g{};
    for (int i = 0; i < 64; ++i)
      g.at[i] = static_cast<uint8_t>(i % 32 / 2 * 4 + i % 2 * 2 + i / 32);
    return g;
  }();
  const __m512i pairs = load512(order.at);
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h)
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p)
#pragma GCC unroll 2
      for (int s = 0; s < 2; ++s) {
        const int quarter = u % 2 * 2 + p, v = 2 * h + s;
        const __m512i w = _mm512_maskz_permutexvar_epi8(
            ~0ull, pairs, load512(c.body + ((u / 2 * 2 + h) * 4 + quarter) * 128 + s * 64));
        const __m512i low = low_nibbles(w), high = high_nibbles(w);
        const uint64_t* mask = c.present + u / 2 * 64 + s * 8 + h * 4 + quarter;
        use(v, 4 * p, expand(c.zero[v], mask[0], low));
        use(v, 4 * p + 1, expand(c.zero[v], mask[16], high));
        use(v, 4 * p + 2, expand(c.zero[v], mask[32], upper_half(low)));
        use(v, 4 * p + 3, expand(c.zero[v], mask[48], upper_half(high)));
      }
}

// stride: bytes of values per chunk, or 0: as many as the mask says.
template <class Use>
DISTAYA_INLINE void visit_mask(Codes& c, int u, int stride, const Use& use) {
  const uint8_t* values = c.values;
  const __m512i nibbles = _mm512_set1_epi16(0x0f0f);
#pragma GCC unroll 2
  for (int b = 0; b < 2; ++b)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        uint64_t mask;
        std::memcpy(&mask, c.body + 8 * (((2 * u + b) * 4 + v) * 4 + i), sizeof mask);
        const __m512i x = _mm512_maskz_cvtepu8_epi16(
            ~0u, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
        values += stride ? stride : (__builtin_popcountll(mask) + 1) / 2;
        // bytes 0x HL -> words 0x 0H0L
        const __m512i codes =
            _mm512_ternarylogic_epi32(nibbles, x, _mm512_slli_epi16(x, 4), 0xe0);
        use(v, 4 * b + i, expand(c.zero[v], mask, codes));
      }
  c.values = values;
}

template <Kind kind, bool natural, class Use>
DISTAYA_INLINE void visit(Codes& c, const Format& f, int u, const Use& use) {
  if constexpr (kind == Kind::int4) visit_int4<natural>(c, u, use);
  if constexpr (kind == Kind::int8) visit_int8(c, u, use);
  if constexpr (kind == Kind::int3) visit_int3(c, u, use);
  if constexpr (kind == Kind::int4_24) visit_24(c, u, use);
  if constexpr (kind == Kind::int4_mask) visit_mask(c, u, 0, use);
  if constexpr (kind == Kind::int4_out) visit_mask(c, u, f.chunk_values(), use);
}

template <Kind kind>
constexpr bool kSparse = kind == Kind::int4_24 || kind == Kind::int4_mask || kind == Kind::int4_out;

// A record, before its first unit. c.zero is set by the caller, before the first unit of a group.
template <Kind kind>
DISTAYA_INLINE void begin(Codes& c, const uint8_t* body) {
  c.body = body, c.values = body + pack::kMaskBytes;
  if constexpr (kind == Kind::int4_24) presence(c);
}

// Zero codes of 64 rows -> the four vectors of Codes::zero. null: symmetric.
DISTAYA_INLINE void spread_zeros(const uint8_t* zeros, int symmetric_zero, __m512i* out) {
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    if (!zeros) {
      out[v] = _mm512_set1_epi8(static_cast<char>(symmetric_zero));
      continue;
    }
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros + 16 * v));
    out[v] = _mm512_mullo_epi32(_mm512_maskz_cvtepu8_epi32(0xffff, bytes),
                                _mm512_set1_epi32(0x01010101));
  }
}

template <Kind kind, bool natural>
void decode(const Format& f, const uint8_t* buffer, int64_t row_tile, int64_t col_tile,
            uint8_t* panel) {
  const uint8_t* record = buffer + pack::record_at(f, buffer, row_tile, col_tile);
  const int units = static_cast<int>(flush_columns(f)) / 32;
  Codes c;
  __m512i zero[4];
  c.zero = zero;
  begin<kind>(c, record + f.body_at());
  for (int u = 0; u < 4; ++u, panel += 8 * 256) {
    if (kSparse<kind> && u % units == 0)
      spread_zeros(zeros_of(f, buffer, row_tile, col_tile, u / units), f.symmetric_zero(), zero);
    visit<kind, natural>(c, f, u, [&](int v, int j, __m512i codes) __attribute__((always_inline)) {
      _mm512_storeu_si512(panel + j * 256 + v * 64, codes);
    });
  }
}
