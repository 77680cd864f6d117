// Scales and zeros of a tile or of a row section, in both directions, and what a survey counts. No
// include guard: read once per instruction set, by pack_cpu.cpp, after tile.h.

namespace distaya::DISTAYA_ISA {

typedef uint8_t vb __attribute__((vector_size(DISTAYA_LANES)));
typedef uint8_t vb_any __attribute__((vector_size(DISTAYA_LANES), aligned(1), may_alias));

namespace {

void report(int64_t* bad, int64_t index);

struct Scales {
  float of[4][kTileRows];  // of group q of the tile
};

// Columns of a tile that share a grid, and the number of such groups.
DISTAYA_INLINE int width_of(const Format& f) {
  return f.group ? static_cast<int>(f.group) : kTileCols;
}

DISTAYA_INLINE int groups_of(const Format& f) { return kTileCols / width_of(f); }

// Calls body(q, r, index): group q of the tile, row r of it, index into [rows, groups]; only those
// that the matrix has.
template <class Body>
DISTAYA_INLINE void over_grid(const Format& f, int64_t rt, int64_t ct, const Body& body) {
  const int64_t first = f.group ? ct * groups_of(f) : 0, groups = f.groups();
  const int rows = static_cast<int>(std::min<int64_t>(kTileRows, f.rows - rt * kTileRows));
  const int here = static_cast<int>(std::min<int64_t>(groups_of(f), groups - first));
  for (int r = 0; r < rows; ++r)
    for (int q = 0; q < here; ++q) body(q, r, (rt * kTileRows + r) * groups + first + q);
}

// ---- packing ----

void take_zeros(const Format& f, const uint8_t* zeros, int64_t rt, int64_t ct, Tile& tile) {
  std::memset(tile.zero, f.symmetric_zero(), sizeof tile.zero);
  if (zeros) over_grid(f, rt, ct, [&](int q, int r, int64_t i) { tile.zero[q][r] = zeros[i]; });
}

// Inf and NaN have all the bits of the exponent.
DISTAYA_INLINE bool finite_bits(Dtype dtype, uint32_t bits) {
  const uint32_t all = dtype == Dtype::f32 ? 0x7f800000u : dtype == Dtype::bf16 ? 0x7f80u : 0x7c00u;
  return (bits & all) != all;
}

template <class Bits>
void put_scales(const pack::Pack& p, int64_t rt, int64_t ct, uint8_t* scales) {
  std::memset(scales, 0, sizeof(Bits) * static_cast<size_t>(groups_of(p.f) * kTileRows));
  over_grid(p.f, rt, ct, [&](int q, int r, int64_t i) {
    const Bits bits = static_cast<const Bits*>(p.scales)[i];
    reinterpret_cast<Bits*>(scales)[q * kTileRows + r] = bits;
    if (!finite_bits(p.f.scale, bits)) report(p.bad + kBadScale, i);
  });
}

void put_grid(const pack::Pack& p, int64_t rt, int64_t ct, const Tile& tile, uint8_t* scales,
              uint8_t* zeros) {
  if (p.f.scale == Dtype::f32)
    put_scales<uint32_t>(p, rt, ct, scales);
  else
    put_scales<uint16_t>(p, rt, ct, scales);
  if (p.f.symmetric) return;
  std::memcpy(zeros, tile.zero, static_cast<size_t>(groups_of(p.f) * kTileRows));
  if (p.f.bits() < 8)
    over_grid(p.f, rt, ct, [&](int, int, int64_t i) {
      if (p.zeros[i] >> p.f.bits()) report(p.bad + kBadZero, i);
    });
}

// Scales and zeros of a row tile inside the row section.
struct RowGrid {
  int64_t scales, zeros;  // from the start of the buffer
};

DISTAYA_INLINE RowGrid row_grid_at(const Format& f, int64_t section, int64_t rt) {
  const int64_t all = f.row_tiles() * kTileRows, first = rt * kTileRows;
  return {section + first * f.scale_bytes(), section + all * f.scale_bytes() + first};
}

void put_row_grid(const pack::Pack& p, int64_t rt, const Tile& tile) {
  const int64_t section = p.bytes - kTail - p.f.row_section_bytes();
  const RowGrid at = row_grid_at(p.f, section, rt);
  put_grid(p, rt, 0, tile, p.data + at.scales, p.data + at.zeros);
}

// ---- reading ----

DISTAYA_INLINE void get_zeros(const Format& f, const uint8_t* zeros, Tile& tile) {
  if (f.symmetric)
    std::memset(tile.zero, f.symmetric_zero(), sizeof tile.zero);
  else
    std::memcpy(tile.zero, zeros, static_cast<size_t>(groups_of(f) * kTileRows));
}

template <class T>
void widen_scales(const uint8_t* scales, int n, float* out) {
  for (int i = 0; i < n; i += kLanes) store(out + i, load(reinterpret_cast<const T*>(scales) + i));
}

void get_scales(const Format& f, const uint8_t* scales, Scales& out) {
  const int n = groups_of(f) * kTileRows;
  switch (f.scale) {
    case Dtype::f32: return widen_scales<float>(scales, n, out.of[0]);
    case Dtype::bf16: return widen_scales<bf16>(scales, n, out.of[0]);
    default: return widen_scales<f16>(scales, n, out.of[0]);
  }
}

void get_row_grid(const Format& f, const uint8_t* data, int64_t rt, Tile& tile, Scales& scales) {
  const RowGrid at = row_grid_at(f, row_section_at(f, data), rt);
  get_scales(f, data + at.scales, scales);
  get_zeros(f, data + at.zeros, tile);
}

template <class Bits>
void copy_out(const pack::Unpack& p, int64_t rt, int64_t ct, const uint8_t* scales,
              const uint8_t* zeros) {
  over_grid(p.f, rt, ct, [&](int q, int r, int64_t i) {
    static_cast<Bits*>(p.scales)[i] = reinterpret_cast<const Bits*>(scales)[q * kTileRows + r];
    if (p.zeros) p.zeros[i] = zeros[q * kTileRows + r];
  });
}

void take_out(const pack::Unpack& p, int64_t rt, int64_t ct, RowGrid at) {
  if (p.f.scale == Dtype::f32)
    copy_out<uint32_t>(p, rt, ct, p.data + at.scales, p.data + at.zeros);
  else
    copy_out<uint16_t>(p, rt, ct, p.data + at.scales, p.data + at.zeros);
}

void take_out_grid(const pack::Unpack& p, int64_t rt, int64_t ct) {
  const int64_t record = record_at(p.f, p.data, rt, ct);
  take_out(p, rt, ct, {record, record + p.f.zeros_at()});
}

void take_out_row_grid(const pack::Unpack& p, int64_t rt) {
  take_out(p, rt, 0, row_grid_at(p.f, row_section_at(p.f, p.data), rt));
}

// ---- survey ----

// The most weights kept of any 4 columns of a row: a row of a chunk is a nibble.
int most_of_columns(const Chunks& chunks) {
  uint64_t reached[4] = {};  // [i]: some bit where a nibble keeps more than i
  for (const uint64_t x : chunks.mask) {
    const uint64_t pairs = x - (x >> 1 & 0x5555555555555555);
    const uint64_t counts = (pairs & 0x3333333333333333) + (pairs >> 2 & 0x3333333333333333);
    for (int i = 0; i < 4; ++i)
      reached[i] |= (counts + static_cast<uint64_t>(7 - i) * kEveryNibble) & 8 * kEveryNibble;
  }
  int most = 0;
  while (most < 4 && reached[most]) ++most;
  return most;
}

// The most weights kept of any kRows rows of a column.
template <int kRows>
int most_of_rows(const Chunks& chunks) {
  constexpr uint64_t kRun = (uint64_t{1} << 4 * kRows) - 1;
  int most = 0;
  for (const uint64_t x : chunks.mask)
    for (int r = 0; r < 16; r += kRows)
      for (int c = 0; c < 4; ++c)
        most = std::max(most, __builtin_popcountll(x >> (4 * r + c) & kRun & kEveryNibble));
  return most;
}

}  // namespace
}  // namespace distaya::DISTAYA_ISA
