// Where every bit of a packed matrix lies. One layout per kind for all kernels, CPU and CUDA, so
// that moving a model between devices is a plain copy; constexpr, so that host code, device code
// and tests compute it from the same text.
//
// A matrix W [rows, cols] is cut into tiles of 64 rows x 128 columns, padded with weights that are
// exactly 0. One tile is one contiguous record: [scales][zeros][body]. The buffer is
//   [records, row tile by row tile]                             all kinds but int4_mask
//   [offsets: uint64 x (tiles + 1)][records]                    int4_mask: records differ in size
//   then, when one grid serves a whole row (group 0), [scales of all rows][zeros of all rows],
//   then kTail bytes that may be read but mean nothing.
//
// The order inside a body serves two readers at once. A warp runs mma.m16n8k16 with weights as
// operand A, four row slabs j = 0..3: row r of slab j is tile row 32 (r / 8) + 4 (r % 8) + j, so
// that 16 bytes of a lane are the same columns of four neighbouring rows; lane 4g + c reads slot
// 8c + g of a 512-byte line. A CPU vector of 64 bytes is then 16 consecutive rows of the same
// columns, one 32-bit word each: what vpdpbusd wants.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace distaya::pack {

enum class Kind : int64_t {
  int4 = 0,       // dense, 4 bits
  int3 = 1,       // dense, 3 bits: a plane of 2 bits and a plane of 1 bit
  int8 = 2,       // dense, 8 bits
  int4_24 = 3,    // at most 2 of every 4 consecutive columns of a row
  int4_mask = 4,  // any pattern: 1 bit per weight, then the kept codes
  int4_out = 5,   // n of every m consecutive rows of a column: as int4_mask, but of fixed size
};

inline constexpr int kTileRows = 64, kTileCols = 128;
inline constexpr int kTileWeights = kTileRows * kTileCols;
inline constexpr int kTail = 64;
inline constexpr int kMaskBytes = kTileWeights / 8;  // also the metadata of int4_24

constexpr int bits_of(Kind kind) { return kind == Kind::int3 ? 3 : kind == Kind::int8 ? 8 : 4; }

// A bit position in the body of a tile: the 32-bit word and the lowest bit in it.
struct Place {
  int word;
  int bit;
};

// Word of tile row r: `block` and `quarter` name its columns. 32 rows lie side by side.
DISTAYA_HD constexpr int word_of(int block, int quarter, int r) {
  return ((block * 2 + r / 32) * 4 + quarter) * 32 + r % 32;
}

// The code of (row r, column k) of a tile, 0 <= r < 64, 0 <= k < 128.

// A word holds 8 columns in the order 0 2 4 6 1 3 5 7: nibbles i and i + 4 are the two neighbours
// of one bf16 pair.
DISTAYA_HD constexpr Place place_int4(int r, int k) {
  return {word_of(k / 32, k / 8 % 4, r), 4 * (k % 8 / 2 + 4 * (k % 2))};
}

DISTAYA_HD constexpr Place place_int8(int r, int k) {
  return {word_of(k / 16, k / 4 % 4, r), 8 * (k % 4)};
}

// int3, low two bits: words 0..511 hold 16 columns each. (w >> 2i) & 0x03030303 = columns 4i..4i+3.
DISTAYA_HD constexpr Place place_int3_low(int r, int k) {
  return {word_of(k / 64, k / 16 % 4, r), 8 * (k % 4) + 2 * (k % 16 / 4)};
}

// int3, third bit: words 512..767 hold 32 columns each. (w >> i) & 0x01010101 = columns 4i..4i+3.
DISTAYA_HD constexpr Place place_int3_high(int r, int k) {
  return {512 + word_of(0, k / 32, r), 8 * (k % 4) + k % 32 / 4};
}

// int4_24: words 0..511 hold the kept codes of 16 columns (4 groups of 4). slot 0 is the kept
// weight with the lower column. Nibble i = slot 0 of group i, nibble i + 4 = slot 1 of group i.
DISTAYA_HD constexpr Place place_24(int r, int k, int slot) {
  return {word_of(k / 64, k / 16 % 4, r), 4 * (k / 4 % 4 + 4 * slot)};
}

// int4_24 metadata: words 512..767, 4 bits per group = lower kept index | higher kept index << 2,
// as mma.sp wants them: of the 64-column block k / 64, lane 4g + i holds for slab j the word of
// rows 4g + j (low half) and 32 + 4g + j (high half); its nibble q is group i of columns 16 q.
DISTAYA_HD constexpr Place place_24_meta(int r, int k) {
  return {512 + (k / 64 * 4 + k / 4 % 4) * 32 + r % 32, 16 * (r / 32) + 4 * (k / 16 % 4)};
}

// int4_mask and int4_out: a chunk is 16 rows x 4 columns = one uint64 of the mask, bit
// 4 (r % 16) + k % 4. Kept codes follow chunk by chunk in the order of the bits, two to a byte, low
// nibble first; every chunk begins on a byte.
DISTAYA_HD constexpr int chunk_of(int r, int k) { return (k / 16 * 4 + r / 16) * 4 + k / 4 % 4; }

DISTAYA_HD constexpr int chunk_bit(int r, int k) { return 4 * (r % 16) + k % 4; }

inline constexpr int kChunks = kTileWeights / 64;

// What a buffer means. group: columns that share a scale, 32, 64 or 128; 0 = the whole row.
// A symmetric matrix has the zero 2^(bits-1) everywhere and stores none.
struct Format {
  Kind kind = Kind::int4;
  int64_t rows = 0, cols = 0;
  int64_t group = 128;
  bool symmetric = true;
  Dtype scale = Dtype::bf16;
  int n = 0, m = 0;  // int4_out only: n kept of every m, m in {2, 4, 8, 16}

  DISTAYA_HD constexpr int bits() const { return bits_of(kind); }

  DISTAYA_HD constexpr int symmetric_zero() const { return 1 << (bits_of(kind) - 1); }

  DISTAYA_HD constexpr int64_t row_tiles() const { return (rows + kTileRows - 1) / kTileRows; }

  DISTAYA_HD constexpr int64_t col_tiles() const { return (cols + kTileCols - 1) / kTileCols; }

  DISTAYA_HD constexpr int64_t tiles() const { return row_tiles() * col_tiles(); }

  DISTAYA_HD constexpr int64_t groups() const {  // scales of a row, all tiles
    return group ? (cols + group - 1) / group : 1;
  }

  DISTAYA_HD constexpr int scale_bytes() const { return scale == Dtype::f32 ? 4 : 2; }

  // Inside a record; offsets in bytes, all multiples of 64.
  DISTAYA_HD constexpr int tile_groups() const {  // kTileCols / group, without dividing
    return group == 32 ? 4 : group == 64 ? 2 : group == 128 ? 1 : 0;
  }

  // Scale of tile row r, group q of the tile: scale number q * 64 + r. Zeros (uint8) likewise.
  DISTAYA_HD constexpr int zeros_at() const { return tile_groups() * kTileRows * scale_bytes(); }

  DISTAYA_HD constexpr int body_at() const {
    return zeros_at() + (symmetric ? 0 : tile_groups() * kTileRows);
  }

  DISTAYA_HD constexpr int values_at() const { return body_at() + kMaskBytes; }  // mask, out

  DISTAYA_HD constexpr int chunk_values() const { return 64 * n / m / 2; }  // out: bytes

  DISTAYA_HD constexpr int body_bytes() const {  // of kinds whose records are all of one size
    switch (kind) {
      case Kind::int3: return kTileWeights * 3 / 8;
      case Kind::int8: return kTileWeights;
      case Kind::int4_24: return kTileWeights / 4 + kMaskBytes;
      case Kind::int4_out: return kMaskBytes + kChunks * chunk_values();
      default: return kTileWeights / 2;
    }
  }

  DISTAYA_HD constexpr int64_t record_bytes() const { return body_at() + body_bytes(); }

  // int4_mask: bytes of the record with this many bytes of values, a multiple of 16.
  DISTAYA_HD constexpr int64_t mask_record_bytes(int64_t values) const {
    return (values_at() + values + 15) / 16 * 16;
  }

  // Inside the buffer.
  DISTAYA_HD constexpr int64_t offsets_bytes() const {  // multiple of 64
    return kind == Kind::int4_mask ? ((tiles() + 1) * 8 + 63) / 64 * 64 : 0;
  }

  DISTAYA_HD constexpr int64_t row_section_bytes() const {
    return group ? 0 : row_tiles() * kTileRows * (scale_bytes() + (symmetric ? 0 : 1));
  }

  // Of kinds of fixed size; int4_mask ends at its last offset instead of tiles() * record_bytes().
  DISTAYA_HD constexpr int64_t records_end() const { return tiles() * record_bytes(); }

  DISTAYA_HD constexpr int64_t bytes(int64_t records_end) const {
    return records_end + row_section_bytes() + kTail;
  }
};

// Where the record of a tile begins. `buffer` is read by int4_mask only; its offsets count from the
// start of the buffer.
DISTAYA_HD inline int64_t record_at(const Format& f, const uint8_t* buffer, int64_t row_tile,
                                    int64_t col_tile) {
  const int64_t tile = row_tile * f.col_tiles() + col_tile;
  if (f.kind != Kind::int4_mask) return tile * f.record_bytes();
  return static_cast<int64_t>(reinterpret_cast<const uint64_t*>(buffer)[tile]);
}

// Where the row section (scales, then zeros, of all padded rows) begins; group 0 only.
DISTAYA_HD inline int64_t row_section_at(const Format& f, const uint8_t* buffer) {
  if (f.kind != Kind::int4_mask) return f.records_end();
  return static_cast<int64_t>(reinterpret_cast<const uint64_t*>(buffer)[f.tiles()]);
}

}  // namespace distaya::pack
