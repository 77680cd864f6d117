// One tile as plain codes, and the bodies of layout.h written from it and read into it. No include
// guard: read once per instruction set, by pack_cpu.cpp. A few codes at a time travel in an integer
// register; pdep and pext move their bits.

#include <utility>

namespace distaya::DISTAYA_ISA {

using namespace distaya::pack;

struct Tile {
  alignas(64) uint8_t codes[kTileRows][kTileCols];
  alignas(64) uint8_t zero[4][kTileRows];  // of group q of the tile; one group if they are wider
};

// The chunks of int4_mask and int4_out.
struct Chunks {
  uint64_t mask[kChunks];  // bit chunk_bit(r, k) = kept
  int values() const;      // bytes of kept codes
};

DISTAYA_INLINE uint64_t gather_bits(uint64_t x, uint64_t mask) {  // bits under mask, side by side
#if DISTAYA_LANES >= 8
  return _pext_u64(x, mask);
#else
  uint64_t out = 0;
  for (int i = 0; mask; ++i, mask &= mask - 1)
    out |= static_cast<uint64_t>((x & mask & (0 - mask)) != 0) << i;
  return out;
#endif
}

DISTAYA_INLINE uint64_t scatter_bits(uint64_t x, uint64_t mask) {  // the way back
#if DISTAYA_LANES >= 8
  return _pdep_u64(x, mask);
#else
  uint64_t out = 0;
  for (; mask; x >>= 1, mask &= mask - 1) out |= (mask & (0 - mask)) & (0 - (x & 1));
  return out;
#endif
}

template <class T>
DISTAYA_INLINE T peek(const void* from) {
  T x;
  std::memcpy(&x, from, sizeof(T));
  return x;
}

template <class T>
DISTAYA_INLINE void poke(void* to, T x) {
  std::memcpy(to, &x, sizeof(T));
}

inline int Chunks::values() const {
  int bytes = 0;
  for (const uint64_t m : mask) bytes += (__builtin_popcountll(m) + 1) / 2;
  return bytes;
}

// Bit i: byte i of 16 differs from `zero`.
DISTAYA_INLINE uint32_t differing(const uint8_t* codes, __m128i zero) {
  const __m128i x = _mm_load_si128(reinterpret_cast<const __m128i*>(codes));
  return 0xffffu & ~static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(x, zero)));
}

constexpr uint64_t kNibbles = 0x000f000f000f000f;  // the lowest of each 16-bit word

inline void find_chunks(const Tile& tile, int width, Chunks& out) {
  for (int k = 0; k < kTileCols; k += 16)
    for (int r0 = 0; r0 < kTileRows; r0 += 16) {
      const uint8_t* zero = tile.zero[k / width] + r0;
      uint64_t chunk[4] = {};
      for (int r = 0; r < 16; r += 4) {
        uint64_t four = 0;  // rows of 16 columns
        for (int i = 0; i < 4; ++i) {
          const __m128i z = _mm_set1_epi8(static_cast<char>(zero[r + i]));
          four |= static_cast<uint64_t>(differing(tile.codes[r0 + r + i] + k, z)) << 16 * i;
        }
        for (int c = 0; c < 4; ++c) chunk[c] |= gather_bits(four, kNibbles << 4 * c) << 4 * r;
      }
      for (int c = 0; c < 4; ++c) out.mask[chunk_of(r0, k + 4 * c)] = chunk[c];
    }
}

// ---- dense kinds ----

inline void write_int4(const Tile& tile, uint32_t* body) {
  for (int k = 0; k < kTileCols; k += 8)
    for (int r = 0; r < kTileRows; ++r) {
      const uint64_t x = peek<uint64_t>(&tile.codes[r][k]);  // even columns, then odd ones
      body[place_int4(r, k).word] =
          static_cast<uint32_t>(gather_bits(x, kNibbles) | gather_bits(x, kNibbles << 8) << 16);
    }
}

inline void read_int4(const uint32_t* body, int r0, int r1, Tile& tile) {
  for (int k = 0; k < kTileCols; k += 8)
    for (int r = r0; r < r1; ++r) {
      const uint32_t w = body[place_int4(r, k).word];
      poke(&tile.codes[r][k], scatter_bits(w, kNibbles) | scatter_bits(w >> 16, kNibbles << 8));
    }
}

inline void write_int8(const Tile& tile, uint32_t* body) {
  for (int k = 0; k < kTileCols; k += 4)
    for (int r = 0; r < kTileRows; ++r)
      body[place_int8(r, k).word] = peek<uint32_t>(&tile.codes[r][k]);
}

inline void read_int8(const uint32_t* body, int r0, int r1, Tile& tile) {
  for (int k = 0; k < kTileCols; k += 4)
    for (int r = r0; r < r1; ++r) poke(&tile.codes[r][k], body[place_int8(r, k).word]);
}

inline void write_int3(const Tile& tile, uint32_t* body) {
  for (int k = 0; k < kTileCols; k += 32)
    for (int r = 0; r < kTileRows; ++r) {
      uint32_t low[2] = {}, high = 0;
      for (int i = 0; i < 8; ++i) {
        const uint32_t x = peek<uint32_t>(&tile.codes[r][k + 4 * i]);
        low[i / 4] |= (x & 0x03030303u) << 2 * (i % 4);
        high |= (x >> 2 & 0x01010101u) << i;
      }
      body[place_int3_low(r, k).word] = low[0];
      body[place_int3_low(r, k + 16).word] = low[1];
      body[place_int3_high(r, k).word] = high;
    }
}

inline void read_int3(const uint32_t* body, int r0, int r1, Tile& tile) {
  for (int k = 0; k < kTileCols; k += 32)
    for (int r = r0; r < r1; ++r) {
      const uint32_t low[2] = {body[place_int3_low(r, k).word],
                               body[place_int3_low(r, k + 16).word]};
      const uint32_t high = body[place_int3_high(r, k).word];
      for (int i = 0; i < 8; ++i)
        poke(&tile.codes[r][k + 4 * i],
             (low[i / 4] >> 2 * (i % 4) & 0x03030303u) | (high >> i & 0x01010101u) << 2);
    }
}

// ---- 2:4 ----

// Half a metadata word: (row, the group of 4 columns in each of the four quarters of 64 columns).
DISTAYA_INLINE uint8_t* meta_at(void* body, int r, int k) {
  const Place at = place_24_meta(r, k);
  return static_cast<uint8_t*>(body) + 4 * at.word + at.bit / 8;
}

// Returns where (row * kTileCols + column) the first group keeps more than two, or -1.
inline int write_24(const Tile& tile, int width, uint32_t* body) {
  int crowded = -1;
  for (int r = 0; r < kTileRows; ++r)
    for (int block = 0; block < kTileCols; block += 64) {
      uint32_t meta[4] = {};
      for (int q = 0; q < 4; ++q) {
        const int k = block + 16 * q;
        const uint8_t* x = tile.codes[r] + k;
        const char zero = static_cast<char>(tile.zero[k / width][r]);
        const uint32_t kept = differing(x, _mm_set1_epi8(zero));
        uint32_t w = 0;
        for (int i = 0; i < 4; ++i) {
          const uint32_t pair = pair_of(kept >> 4 * i & 15);
          if (pair == 0 && crowded < 0) crowded = r * kTileCols + k + 4 * i;
          w |= static_cast<uint32_t>(x[4 * i + (pair & 3)]) << 4 * i;
          w |= static_cast<uint32_t>(x[4 * i + (pair >> 2)]) << (4 * i + 16);
          meta[i] |= pair << 4 * q;
        }
        body[place_24(r, k, 0).word] = w;
      }
      for (int i = 0; i < 4; ++i)
        poke(meta_at(body, r, block + 4 * i), static_cast<uint16_t>(meta[i]));
    }
  return crowded;
}

inline void read_24(const uint32_t* body, int width, int r0, int r1, Tile& tile) {
  for (int r = r0; r < r1; ++r)
    for (int block = 0; block < kTileCols; block += 64) {
      uint32_t meta[4];
      for (int i = 0; i < 4; ++i) {
        const Place at = place_24_meta(r, block + 4 * i);
        meta[i] = body[at.word] >> at.bit;
      }
      for (int q = 0; q < 4; ++q) {
        const int k = block + 16 * q;
        const uint32_t w = body[place_24(r, k, 0).word], zero = tile.zero[k / width][r];
        for (int i = 0; i < 4; ++i) {
          const uint32_t pair = meta[i] >> 4 * q;
          const uint32_t a = (w >> 4 * i & 15) ^ zero, b = (w >> (4 * i + 16) & 15) ^ zero;
          poke(&tile.codes[r][k + 4 * i],
               (zero * 0x01010101u) ^ a << 8 * (pair & 3) ^ b << 8 * (pair >> 2 & 3));
        }
      }
    }
}

// ---- mask and out ----

constexpr uint64_t kEveryNibble = 0x1111111111111111;
constexpr uint32_t kLowNibbles = 0x0f0f0f0f;

// The kept codes of a chunk, `bytes` <= 32 of them.
inline void write_chunk(const Tile& tile, uint64_t mask, int r0, int k, uint8_t* out, int bytes) {
  uint64_t kept[5] = {};
  int count = 0;  // nibbles written
  for (int r = 0; r < 16; r += 4, mask >>= 16) {
    uint64_t four = 0;
    for (int i = 0; i < 4; ++i)
      four |= gather_bits(peek<uint32_t>(&tile.codes[r0 + r + i][k]), kLowNibbles) << 16 * i;
    const uint64_t which = mask & 0xffff;
    const uint64_t x = gather_bits(four, scatter_bits(which, kEveryNibble) * 15);
    const int word = count / 16, shift = count % 16 * 4;
    kept[word] |= x << shift;
    if (shift) kept[word + 1] |= x >> (64 - shift);
    count += __builtin_popcountll(which);
  }
  std::memcpy(out, kept, static_cast<size_t>(bytes));
}

// May read 40 bytes from `from`, which kTail allows at the end of a buffer.
inline void read_chunk(const uint8_t* from, uint64_t mask, const uint8_t* zero, int r0, int k,
                       Tile& tile) {
  uint64_t kept[5];
  std::memcpy(kept, from, sizeof kept);
  int count = 0;
  for (int r = 0; r < 16; r += 4, mask >>= 16) {
    const int word = count / 16, shift = count % 16 * 4;
    uint64_t x = kept[word] >> shift;
    if (shift) x |= kept[word + 1] << (64 - shift);
    const uint64_t which = mask & 0xffff, under = scatter_bits(which, kEveryNibble) * 15;
    x = scatter_bits(x, under);
    const uint32_t z = peek<uint32_t>(zero + r0 + r);  // of four rows
    const uint64_t fill = scatter_bits(z, 0x00ff00ff00ff00ff) * 0x1111;
    x |= fill & ~under;
    for (int i = 0; i < 4; ++i)
      poke(&tile.codes[r0 + r + i][k],
           static_cast<uint32_t>(scatter_bits(x >> 16 * i & 0xffff, kLowNibbles)));
    count += __builtin_popcountll(which);
  }
}

// Every chunk in turn, with where its codes begin; `each` = bytes of a chunk of int4_out, or 0.
template <class Body>
DISTAYA_INLINE void over_chunks(const uint64_t* masks, int each, const Body& body) {
  int at = 0;
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int bytes = (__builtin_popcountll(masks[chunk]) + 1) / 2;
    const int r0 = chunk / 4 % 4 * 16, k = chunk / 16 * 16 + chunk % 4 * 4;
    body(masks[chunk], r0, k, each ? chunk * each : at, bytes);
    at += bytes;
  }
}

inline void write_chunks(const Tile& tile, const Chunks& chunks, int each, uint8_t* body) {
  std::memcpy(body, chunks.mask, kMaskBytes);
  if (each) std::memset(body + kMaskBytes, 0, static_cast<size_t>(kChunks * each));
  over_chunks(chunks.mask, each, [&](uint64_t mask, int r0, int k, int at, int bytes) {
    write_chunk(tile, mask, r0, k, body + kMaskBytes + at, bytes);
  });
}

inline void read_chunks(const uint8_t* body, int width, int each, int r0, int r1, Tile& tile) {
  over_chunks(reinterpret_cast<const uint64_t*>(body), each,
              [&](uint64_t mask, int row, int k, int at, int) {
                if (row + 16 > r0 && row < r1)
                  read_chunk(body + kMaskBytes + at, mask, tile.zero[k / width], row, k, tile);
              });
}

}  // namespace distaya::DISTAYA_ISA
