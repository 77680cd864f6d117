// Textual part of sqgemm_cpu.cpp, AVX2 and portable: codes of a tile -> its panel, kLanes rows at a
// time, one 32-bit word each.

inline constexpr int kRowVectors = kTileRows / kLanes;

DISTAYA_INLINE vu load_bits(const uint8_t* p) {
  typedef uint32_t any __attribute__((vector_size(DISTAYA_LANES * 4), aligned(4), may_alias));
  return *reinterpret_cast<const any*>(p);
}

// The 4 columns k .. k + 3 of vector v of the rows.
DISTAYA_INLINE void put_codes(uint8_t* panel, int k, int v, vu codes) {
  std::memcpy(panel + panel_at(v * kLanes, k), &codes, sizeof codes);
}

// Where word_of(block, quarter, row v * kLanes) is.
DISTAYA_INLINE const uint8_t* word_at(const uint8_t* body, int block, int quarter, int v) {
  return body + 4 * pack::word_of(block, quarter, v * kLanes);
}

template <bool natural>
void decode_int4(const uint8_t* body, uint8_t* panel) {
  for (int k = 0; k < kTileCols; k += 8)
    for (int v = 0; v < kRowVectors; ++v) {
      const vu w = load_bits(word_at(body, k / 32, k / 8 % 4, v));
      vu low = w & 0x0f0f0f0fu, high = (w >> 4) & 0x0f0f0f0fu;  // columns 0 4 1 5 and 2 6 3 7
      if constexpr (natural) {
        const vu first =
            (low & 0xffu) | (low >> 8 & 0xff00u) | (high & 0xffu) << 16 | (high & 0xff0000u) << 8;
        high = (low >> 8 & 0xffu) | (low >> 16 & 0xff00u) | (high & 0xff00u) << 8 |
               (high & 0xff000000u);
        low = first;
      }
      put_codes(panel, k, v, low);
      put_codes(panel, k + 4, v, high);
    }
}

inline void decode_int8(const uint8_t* body, uint8_t* panel) {
  for (int k = 0; k < kTileCols; k += 4)
    for (int v = 0; v < kRowVectors; ++v)
      put_codes(panel, k, v, load_bits(word_at(body, k / 16, k / 4 % 4, v)));
}

inline void decode_int3(const uint8_t* body, uint8_t* panel) {
  for (int k = 0; k < kTileCols; k += 16)
    for (int v = 0; v < kRowVectors; ++v) {
      const vu two = load_bits(word_at(body, k / 64, k / 16 % 4, v));
      const vu one = load_bits(word_at(body, 0, k / 32, v) + 2048) >> (k % 32 / 4);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        put_codes(panel, k + 4 * i, v,
                  (two >> 2 * i & 0x03030303u) | (one >> i & 0x01010101u) << 2);
    }
}

// The zero codes of kLanes rows, in all four bytes of a row's word.
DISTAYA_INLINE vu zero_words(const Format& f, const uint8_t* zeros, int v) {
  vu w = vu{} + static_cast<uint32_t>(f.symmetric_zero());
  if (zeros)
    for (int l = 0; l < kLanes; ++l) w[l] = zeros[v * kLanes + l];
  return w * 0x01010101u;
}

// A kept code is shifted to the byte its two bits of metadata name.
inline void decode_24(const Format& f, const uint8_t* body, const uint8_t* const* zeros, int width,
                      uint8_t* panel) {
  for (int v = 0; v < kRowVectors; ++v)
    for (int k = 0; k < kTileCols; k += 16) {
      const vu zero = zero_words(f, zeros[k / width], v);
      const vu w = load_bits(word_at(body, k / 64, k / 16 % 4, v));
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const pack::Place place = pack::place_24_meta(v * kLanes, k + 4 * i);
        const vu meta = load_bits(body + 4 * place.word) >> place.bit;
        const vu low = (meta & 3u) << 3, high = (meta >> 2 & 3u) << 3, byte = vu{} + 255u;
        const vu kept = (w >> 4 * i & 15u) << low | (w >> (4 * i + 16) & 15u) << high;
        put_codes(panel, k + 4 * i, v, (zero & ~(byte << low | byte << high)) | kept);
      }
    }
}

// 4 rows x 4 columns of a chunk -> 16 bytes: kept codes are the next nibbles, the others come from
// `fill` [4 rows][4 columns], a nibble each.
DISTAYA_INLINE void put_kept(uint32_t mask, uint64_t nibbles, uint64_t fill, uint8_t* out) {
#if DISTAYA_LANES == 8
  const uint64_t kept = _pdep_u64(mask, 0x1111111111111111u) * 15;
  const uint64_t codes = _pdep_u64(nibbles, kept) | (fill & ~kept);
  const uint64_t low = _pdep_u64(codes, 0x0f0f0f0f0f0f0f0fu);
  const uint64_t high = _pdep_u64(codes >> 32, 0x0f0f0f0f0f0f0f0fu);
  std::memcpy(out, &low, sizeof low);
  std::memcpy(out + 8, &high, sizeof high);
#else
  for (int i = 0; i < 16; ++i) {
    const uint64_t kept = mask >> i & 1;
    out[i] = (kept ? nibbles : fill >> 4 * i) & 15;
    nibbles >>= 4 * kept;
  }
#endif
}

// 16 nibbles from nibble n on.
DISTAYA_INLINE uint64_t nibbles_at(const uint8_t* values, int n) {
  uint64_t low, high;
  std::memcpy(&low, values + n / 2, sizeof low);
  std::memcpy(&high, values + n / 2 + 8, sizeof high);
  const int shift = n % 2 * 4;
  return low >> shift | high << 1 << (63 - shift);
}

inline void decode_mask(const Format& f, const uint8_t* body, const uint8_t* const* zeros,
                        int width, uint8_t* panel) {
  uint64_t fill[4][kTileRows / 4];  // zeros of 4 rows, 4 nibbles each
  for (int q = 0; q < kTileCols / width; ++q)
    for (int r = 0; r < kTileRows; r += 4) {
      fill[q][r / 4] = 0;
      for (int i = 3; i >= 0; --i)
        fill[q][r / 4] =
            fill[q][r / 4] << 16 | 0x1111u * (zeros[q] ? zeros[q][r + i] : f.symmetric_zero());
    }
  const uint8_t* values = body + pack::kMaskBytes;
  for (int chunk = 0; chunk < pack::kChunks; ++chunk) {
    uint64_t mask;
    std::memcpy(&mask, body + 8 * chunk, sizeof mask);
    const int row = chunk / 4 % 4 * 16, k = chunk / 16 * 16 + chunk % 4 * 4;
    int n = 0;
    for (int r = row; r < row + 16; r += 4, mask >>= 16) {
      put_kept(mask & 0xffff, nibbles_at(values, n), fill[k / width][r / 4],
               panel + panel_at(r, k));
      n += __builtin_popcount(mask & 0xffff);
    }
    values += f.kind == Kind::int4_out ? f.chunk_values() : (n + 1) / 2;
  }
}

template <Kind kind, bool natural>
void decode(const Format& f, const uint8_t* buffer, int64_t row_tile, int64_t col_tile,
            uint8_t* panel) {
  const uint8_t* body = buffer + pack::record_at(f, buffer, row_tile, col_tile) + f.body_at();
  if constexpr (kind == Kind::int4) return decode_int4<natural>(body, panel);
  if constexpr (kind == Kind::int8) return decode_int8(body, panel);
  if constexpr (kind == Kind::int3) return decode_int3(body, panel);
  const int width = static_cast<int>(flush_columns(f));
  const uint8_t* zeros[4];
  for (int q = 0; q < kTileCols / width; ++q) zeros[q] = zeros_of(f, buffer, row_tile, col_tile, q);
  if constexpr (kind == Kind::int4_24) return decode_24(f, body, zeros, width, panel);
  decode_mask(f, body, zeros, width, panel);
}
