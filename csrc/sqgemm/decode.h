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

// Byte of a panel that holds (row r, column k).
constexpr int panel_at(int r, int k) { return (k / 4 * kTileRows + r) * 4 + k % 4; }

#if DISTAYA_LANES == 16
#include "sqgemm/decode_avx512.h"
#else
#include "sqgemm/decode_words.h"
#endif

// run.operator()<kind>()
template <class Run>
DISTAYA_INLINE void each_kind(Kind kind, const Run& run) {
  switch (kind) {
    case Kind::int4: return run.template operator()<Kind::int4>();
    case Kind::int3: return run.template operator()<Kind::int3>();
    case Kind::int8: return run.template operator()<Kind::int8>();
    case Kind::int4_24: return run.template operator()<Kind::int4_24>();
    case Kind::int4_mask: return run.template operator()<Kind::int4_mask>();
    default: return run.template operator()<Kind::int4_out>();
  }
}

// Codes of a tile as vpdpbusd wants them: panel [k / 4][64 rows][4 columns], columns in their own
// order (decode<kind, false> leaves those of int4 in the order of interleave8()). Padding and
// pruned weights hold the zero of their row.
inline void decode_panel(const Format& f, const uint8_t* buffer, int64_t row_tile, int64_t col_tile,
                         uint8_t* panel) {
  each_kind(f.kind, [&]<Kind kind>() { decode<kind, true>(f, buffer, row_tile, col_tile, panel); });
}
