// Textual part of sqgemm_cpu.cpp, AVX-512 only: the codes of a tile in the order in which they lie,
// as operands of vpdpbusd. A unit is 32 columns of the tile; use(j, w) is called for j = 0 .. 7
// with the columns 4 j .. 4 j + 3 of the unit, w[v] being rows 16 v .. 16 v + 15, one word each.

struct Codes {
  const uint8_t* body;
  const uint8_t* values;  // int4_mask, int4_out: the next chunk's
  const vi* zero;         // [4] the zero code of each row, in all four bytes of its word
  alignas(64) uint64_t present[128];  // int4_24: [64 columns][group][16 of 32 rows][half][quarter]
};

inline constexpr int32_t kNibbles = 0x0f0f0f0f;

DISTAYA_INLINE vi load_codes(const void* p) { return (vi)_mm512_loadu_si512(p); }

// Byte i of the result is byte order[i] of x; of x, then y.
DISTAYA_INLINE vi shuffle(vi x, const uint8_t* order) {
  return (vi)_mm512_maskz_permutexvar_epi8(~0ull, (__m512i)load_codes(order), (__m512i)x);
}

DISTAYA_INLINE vi shuffle_two(vi x, const uint8_t* order, vi y) {
  return (vi)_mm512_permutex2var_epi8((__m512i)x, (__m512i)load_codes(order), (__m512i)y);
}

// The next bytes of `codes` where the mask has a bit, zero elsewhere. (From memory a mask register
// loads twice as fast as from an integer register, the compiler's choice.)
DISTAYA_INLINE vi expand(vi zero, const uint64_t* mask, vi codes) {
  __mmask64 k;
  asm("kmovq %1, %0" : "=k"(k) : "m"(*mask));
  return (vi)_mm512_mask_expand_epi8((__m512i)zero, k, (__m512i)codes);
}

DISTAYA_INLINE vi upper_half(vi x) {  // and anything above it
  return (vi)_mm512_castsi256_si512(_mm512_maskz_extracti64x4_epi64(0xf, (__m512i)x, 1));
}

// Metadata of int4_24 -> one bit per weight, as vpexpandb wants it. A nibble of metadata (two kept
// columns) becomes a nibble of four bits by a table; then the nibbles of two neighbouring rows
// share a byte, even quarters in the low and odd ones in the high half of a qword; then the eight
// bytes of a (half, quarter) move together.
DISTAYA_INLINE void presence(Codes& c) {
  // entry a | b << 2 = 1 << a | 1 << b
  const __m512i table = _mm512_maskz_broadcast_i32x4(
      0xffff, _mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8));
  alignas(64) static constexpr auto gather = [] {
    struct {
      uint8_t at[64];
    } g{};
    for (int m = 0; m < 8; ++m)  // m = half * 4 + quarter
      for (int p = 0; p < 8; ++p)
        g.at[m * 8 + p] = static_cast<uint8_t>(p * 8 + m / 4 * 2 + m % 4 / 2 + 4 * (m % 2));
    return g;
  }();
  const uint8_t* meta = c.body + pack::kTileWeights / 4;
  const auto bits = [&](vi pairs) __attribute__((always_inline)) {
    const __m512i x = _mm512_shuffle_epi8(table, (__m512i)(pairs & kNibbles));
    return _mm512_or_si512(x, _mm512_maskz_srli_epi64(0xff, x, 28));
  };
#pragma GCC unroll 4
  for (int i = 0; i < 16; ++i) {
    const vi w = load_codes(meta + 64 * i);
    const __m512i even = bits(w), odd = bits((vi)((vu)w >> 4));
    const vi both = (vi)_mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA);
    _mm512_store_si512(c.present + 8 * i, (__m512i)shuffle(both, gather.at));
  }
}

// natural: columns 0 1 2 3 | 4 5 6 7 of each 8; else as the nibbles lie, 0 4 1 5 | 2 6 3 7.
template <bool natural, class Use>
DISTAYA_INLINE void visit_int4(const Codes& c, int u, const Use& use) {
  alignas(64) static constexpr auto order = [] {
    struct {
      uint8_t at[2][64];
    } g{};
    for (int i = 0; i < 64; ++i)  // bytes 0..63 of the low nibbles, 64.. of the high ones
      for (int j = 0; j < 2; ++j)
        g.at[j][i] = static_cast<uint8_t>(i / 4 * 4 + j + 2 * (i % 2) + 64 * (i % 4 / 2));
    return g;
  }();
  const uint8_t* body = c.body + u * 1024;
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    vi low[4], high[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const vi w = load_codes(body + v / 2 * 512 + q * 128 + v % 2 * 64);
      low[v] = w & kNibbles, high[v] = (vi)((vu)w >> 4) & kNibbles;
      if constexpr (natural) {
        const vi first = low[v];
        low[v] = shuffle_two(first, order.at[0], high[v]);
        high[v] = shuffle_two(first, order.at[1], high[v]);
      }
    }
    use(2 * q, low);
    use(2 * q + 1, high);
  }
}

template <class Use>
DISTAYA_INLINE void visit_int8(const Codes& c, int u, const Use& use) {
  const uint8_t* body = c.body + u * 2048;
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    vi w[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      w[v] = load_codes(body + j / 4 * 1024 + v / 2 * 512 + j % 4 * 128 + v % 2 * 64);
    use(j, w);
  }
}

template <class Use>
DISTAYA_INLINE void visit_int3(const Codes& c, int u, const Use& use) {
  const uint8_t *body = c.body + u / 2 * 1024 + u % 2 * 256, *plane = c.body + 2048 + u * 128;
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    vi w[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const vu two = (vu)load_codes(body + v / 2 * 512 + j / 4 * 128 + v % 2 * 64);
      const vu one = (vu)load_codes(plane + v / 2 * 512 + v % 2 * 64);
      // bits 0 and 1 of each byte from the one plane, bit 2 from the other
      const vu third = j < 2 ? one << (2 - j) : one >> (j - 2);
      w[v] = (vi)((((two >> 2 * (j % 4)) & 0x03030303u) | (third & ~0x03030303u)) & 0x07070707u);
    }
    use(j, w);
  }
}

// A word holds 16 columns; its bytes in the order 0 2 | 1 3 are the kept pairs of groups 0 and 1 |
// 2 and 3, so after one vpermb each half of a vector is 16 rows of one group.
template <class Use>
DISTAYA_INLINE void visit_24(const Codes& c, int u, const Use& use) {
  alignas(64) static constexpr auto order = [] {
    struct {
      uint8_t at[64];
    } g{};
    for (int i = 0; i < 64; ++i)
      g.at[i] = static_cast<uint8_t>(i % 32 / 2 * 4 + i % 2 * 2 + i / 32);
    return g;
  }();
  const uint8_t* body = c.body + u / 2 * 1024 + u % 2 * 256;
  const uint64_t* present = c.present + u / 2 * 64 + u % 2 * 2;
#pragma GCC unroll 2
  for (int p = 0; p < 2; ++p) {
    vi words[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      words[v] = shuffle(load_codes(body + v / 2 * 512 + p * 128 + v % 2 * 64), order.at);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      vi w[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const vi pairs = (i % 2 ? (vi)((vu)words[v] >> 4) : words[v]) & kNibbles;
        w[v] = expand(c.zero[v], present + i * 16 + v % 2 * 8 + v / 2 * 4 + p,
                      i < 2 ? pairs : upper_half(pairs));
      }
      use(4 * p + i, w);
    }
  }
}

// stride: bytes of values per chunk, or 0: as many as the mask says. The chunks of a quad of
// columns lie 4 apart, so four places in the values are kept.
template <class Use>
DISTAYA_INLINE void visit_mask(Codes& c, int u, int stride, const Use& use) {
#pragma GCC unroll 2
  for (int b = 0; b < 2; ++b) {
    const uint64_t* masks = reinterpret_cast<const uint64_t*>(c.body) + 32 * u + 16 * b;
    const uint8_t* values[4][4];
    const uint8_t* next = c.values;
#pragma GCC unroll 16
    for (int chunk = 0; chunk < 16; ++chunk) {
      values[chunk / 4][chunk % 4] = next;
      next += stride ? stride : (__builtin_popcountll(masks[chunk]) + 1) / 2;
    }
    c.values = next;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      vi w[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const vu x = (vu)_mm512_maskz_cvtepu8_epi16(
            ~0u, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values[v][i])));
        w[v] = expand(c.zero[v], masks + 4 * v + i, (vi)(x | x << 4) & kNibbles);
      }
      use(4 * b + i, w);
    }
  }
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

// Zero codes of 64 rows, in all four bytes of a row's word -> out [4]. null: symmetric.
DISTAYA_INLINE void spread_zeros(const uint8_t* zeros, int symmetric_zero, vi* out) {
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    if (!zeros) {
      out[v] = (vi)_mm512_set1_epi8(static_cast<char>(symmetric_zero));
      continue;
    }
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros + 16 * v));
    out[v] = (vi)((vu)_mm512_maskz_cvtepu8_epi32(0xffff, bytes) * 0x01010101u);
  }
}

template <Kind kind, bool natural>
void decode(const Format& f, const uint8_t* buffer, int64_t row_tile, int64_t col_tile,
            uint8_t* panel) {
  const uint8_t* record = buffer + pack::record_at(f, buffer, row_tile, col_tile);
  const int units = static_cast<int>(flush_columns(f)) / 32;
  vi zero[4] = {};
  Codes c;
  c.zero = zero;
  begin<kind>(c, record + f.body_at());
  for (int u = 0; u < 4; ++u, panel += 8 * 256) {
    if (kSparse<kind> && u % units == 0)
      spread_zeros(zeros_of(f, buffer, row_tile, col_tile, u / units), f.symmetric_zero(), zero);
    visit<kind, natural>(c, f, u, [&](int j, const vi* w) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) _mm512_storeu_si512(panel + j * 256 + v * 64, (__m512i)w[v]);
    });
  }
}
