// Textual part of sqgemm_cpu.cpp: tiles of packed weights -> what the kernels multiply with.

using pack::Format;
using pack::Kind;
using pack::kTileCols;
using pack::kTileRows;

// Columns per activation block and per flush of the integer sums: the group, or a whole tile.
constexpr int64_t flush_columns(const Format& f) { return f.group ? f.group : kTileCols; }

// Zeros of tile group q (of the row section with group 0), or null: symmetric.
inline const uint8_t* zeros_of(const Format& f, const uint8_t* buffer, int64_t row_tile,
                               int64_t col_tile, int q) {
  if (f.symmetric) return nullptr;
  if (f.group)
    return buffer + pack::record_at(f, buffer, row_tile, col_tile) + f.zeros_at() + q * kTileRows;
  const int64_t scales = f.row_tiles() * kTileRows * f.scale_bytes();
  return buffer + pack::row_section_at(f, buffer) + scales + row_tile * kTileRows;
}

template <class T>
DISTAYA_INLINE void widen_scales(const uint8_t* from, float* to) {
  for (int r = 0; r < kTileRows; r += kLanes)
    store(to + r, load(reinterpret_cast<const T*>(from) + r));
}

// Scales and zeros of a tile as fp32: [q][64], q < max(1, tile_groups). Group 0 reads the row
// section.
inline void tile_grid(const Format& f, const uint8_t* buffer, int64_t row_tile, int64_t col_tile,
                      float* scales, float* zeros) {
  const int groups = std::max(1, f.tile_groups());
  const int64_t line = static_cast<int64_t>(kTileRows) * f.scale_bytes();
  const uint8_t* from = buffer + (f.group ? pack::record_at(f, buffer, row_tile, col_tile)
                                          : pack::row_section_at(f, buffer) + row_tile * line);
  for (int q = 0; q < groups; ++q) {
    float* to = scales + q * kTileRows;
    dispatch<float, f16, bf16>(f.scale, "scales",
                               [&]<class T>() { widen_scales<T>(from + q * line, to); });
    const uint8_t* zero = zeros_of(f, buffer, row_tile, col_tile, q);
    for (int r = 0; r < kTileRows; ++r)
      zeros[q * kTileRows + r] = static_cast<float>(zero ? zero[r] : f.symmetric_zero());
  }
}

DISTAYA_INLINE int bits_at(const uint8_t* body, pack::Place place, int bits) {
  uint32_t word;
  std::memcpy(&word, body + 4 * place.word, sizeof word);
  return static_cast<int>(word >> place.bit & ((1u << bits) - 1));
}

// Byte of the panel that holds (row r, column k).
constexpr int panel_at(int r, int k) { return (k / 4 * kTileRows + r) * 4 + k % 4; }

inline void decode_dense(const Format& f, const uint8_t* body, uint8_t* panel) {
  for (int k = 0; k < kTileCols; ++k)
    for (int r = 0; r < kTileRows; ++r) {
      int code;
      if (f.kind == Kind::int4) {
        code = bits_at(body, pack::place_int4(r, k), 4);
      } else if (f.kind == Kind::int8) {
        code = bits_at(body, pack::place_int8(r, k), 8);
      } else {
        code = bits_at(body, pack::place_int3_low(r, k), 2) |
               bits_at(body, pack::place_int3_high(r, k), 1) << 2;
      }
      panel[panel_at(r, k)] = static_cast<uint8_t>(code);
    }
}

inline void decode_24(const uint8_t* body, uint8_t* panel) {
  for (int k = 0; k < kTileCols; k += 4)
    for (int r = 0; r < kTileRows; ++r) {
      const int kept = bits_at(body, pack::place_24_meta(r, k), 4);
      const int low = bits_at(body, pack::place_24(r, k, 0), 4);
      const int high = bits_at(body, pack::place_24(r, k, 1), 4);
      panel[panel_at(r, k + (kept & 3))] = static_cast<uint8_t>(low);
      panel[panel_at(r, k + (kept >> 2))] = static_cast<uint8_t>(high);
    }
}

inline void decode_mask(const Format& f, const uint8_t* body, uint8_t* panel) {
  const uint8_t* values = body + pack::kMaskBytes;
  for (int chunk = 0; chunk < pack::kChunks; ++chunk) {
    uint64_t mask;
    std::memcpy(&mask, body + 8 * chunk, sizeof mask);
    const int row = chunk / 4 % 4 * 16, col = chunk / 16 * 16 + chunk % 4 * 4;
    int n = 0;
    for (uint64_t left = mask; left; left &= left - 1, ++n) {
      const int bit = __builtin_ctzll(left);
      panel[panel_at(row + bit / 4, col + bit % 4)] = values[n / 2] >> 4 * (n % 2) & 15;
    }
    values += f.kind == Kind::int4_out ? f.chunk_values() : (n + 1) / 2;
  }
}

// Codes of a tile as vpdpbusd wants them: panel [k / 4][64 rows][4 columns], columns in their own
// order; padding and pruned weights hold the zero of their row.
inline void decode_panel(const Format& f, const uint8_t* buffer, int64_t row_tile, int64_t col_tile,
                         uint8_t* panel) {
  const uint8_t* body = buffer + pack::record_at(f, buffer, row_tile, col_tile) + f.body_at();
  if (f.kind != Kind::int4_24 && f.kind != Kind::int4_mask && f.kind != Kind::int4_out)
    return decode_dense(f, body, panel);
  for (int k = 0; k < kTileCols; ++k) {
    const int q = f.group ? static_cast<int>(k / f.group) : 0;
    const uint8_t* zero = zeros_of(f, buffer, row_tile, col_tile, q);
    for (int r = 0; r < kTileRows; ++r)
      panel[panel_at(r, k)] = static_cast<uint8_t>(zero ? zero[r] : f.symmetric_zero());
  }
  if (f.kind == Kind::int4_24) return decode_24(body, panel);
  decode_mask(f, body, panel);
}
