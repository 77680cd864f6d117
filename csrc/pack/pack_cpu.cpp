#include <atomic>

#include "pack/pack.h"

#define DISTAYA_ISA_FILE "pack/pack_cpu.cpp"
#include "core/foreach_isa.h"

#ifdef DISTAYA_ISA_PASS

#include "pack/tile.h"
// After it: both need the tile.
#include "pack/grid.h"

namespace distaya::DISTAYA_ISA {
namespace {

// Work is spread by spans of tiles of one row of them: neighbours in memory on both sides.
constexpr int64_t kSpan = 16;

template <class Body>
void over_spans(const Format& f, int64_t first_row_tile, int64_t row_tiles, const Body& body) {
  const int64_t spans = std::max<int64_t>(1, (f.col_tiles() + kSpan - 1) / kSpan);
  cpu::parallel_for(row_tiles * spans, [&](int64_t task) {
    const int64_t begin = task % spans * kSpan;
    body(first_row_tile + task / spans, begin, std::min(begin + kSpan, f.col_tiles()));
  });
}

// *bad starts as -1, the largest unsigned; the minimum does not depend on who comes first.
void report(int64_t* bad, int64_t index) {
  std::atomic_ref<int64_t> least(*bad);
  int64_t now = least.load(std::memory_order_relaxed);
  while (static_cast<uint64_t>(index) < static_cast<uint64_t>(now) &&
         !least.compare_exchange_weak(now, index)) {
  }
}

// The codes of a tile, with padding. Returns false when one has more bits than the kind.
bool take_codes(const Format& f, const uint8_t* codes, int64_t rt, int64_t ct, Tile& tile) {
  const int width = width_of(f);
  const int64_t top = rt * kTileRows, left = ct * kTileCols;
  const int rows = static_cast<int>(std::min<int64_t>(kTileRows, f.rows - top));
  const int cols = static_cast<int>(std::min<int64_t>(kTileCols, f.cols - left));
  uint8_t all = 0;
  for (int r = 0; r < kTileRows; ++r) {
    const int n = r < rows ? cols : 0;
    uint8_t* to = tile.codes[r];
    if (n < kTileCols)
      for (int k = 0; k < kTileCols; k += width)
        std::memset(to + k, tile.zero[k / width][r], static_cast<size_t>(width));
    if (n) std::memcpy(to, codes + (top + r) * f.cols + left, static_cast<size_t>(n));
    for (int k = 0; k < kTileCols; ++k) all |= to[k];
  }
  return all >> f.bits() == 0;
}

void report_code(const pack::Pack& p, int64_t rt, int64_t ct) {
  const Format& f = p.f;
  for (int64_t i = rt * kTileRows; i < std::min(f.rows, (rt + 1) * kTileRows); ++i)
    for (int64_t j = ct * kTileCols; j < std::min(f.cols, (ct + 1) * kTileCols); ++j)
      if (p.codes[i * f.cols + j] >> f.bits()) return report(p.bad + kBadCode, i * f.cols + j);
}

// Where in a tile (row * kTileCols + column) the first group of m rows keeps more than n, or -1.
int crowded_rows(const Chunks& chunks, int n, int m) {
  int first = -1;
  const uint64_t rows = m == 16 ? ~uint64_t{0} : (uint64_t{1} << 4 * m) - 1;
  for (int chunk = 0; chunk < kChunks; ++chunk)
    for (int r = 0; r < 16; r += m)
      for (int c = 0; c < 4; ++c) {
        const uint64_t kept = chunks.mask[chunk] & rows << 4 * r & kEveryNibble << c;
        if (__builtin_popcountll(kept) <= n) continue;
        const int at = (chunk / 4 % 4 * 16 + r) * kTileCols + chunk / 16 * 16 + chunk % 4 * 4 + c;
        if (first < 0 || at < first) first = at;
      }
  return first;
}

void report_pattern(const pack::Pack& p, int64_t rt, int64_t ct, int at) {
  const int64_t row = rt * kTileRows + at / kTileCols, col = ct * kTileCols + at % kTileCols;
  report(p.bad + kBadPattern, row * p.f.cols + col);
}

// int4_mask: where its record goes, or null (and a report) when it does not fit in there.
uint8_t* mask_record(const pack::Pack& p, int64_t tile, int values) {
  const int64_t begin = p.offsets[tile], end = p.offsets[tile + 1];
  const int64_t last = p.bytes - p.f.row_section_bytes() - kTail;
  const int64_t size = p.f.mask_record_bytes(values);
  if (begin >= p.f.offsets_bytes() && begin % 16 == 0 && end <= last && end - begin == size)
    return p.data + begin;
  report(p.bad + kBadRecord, tile);
  return nullptr;
}

void write_tile(const pack::Pack& p, int64_t rt, int64_t ct, Tile& tile) {
  const Format& f = p.f;
  const int width = width_of(f);
  const int64_t number = rt * f.col_tiles() + ct;
  if (!take_codes(f, p.codes, rt, ct, tile)) report_code(p, rt, ct);
  Chunks chunks;
  uint8_t* record = p.data + number * f.record_bytes();
  int each = 0, values = 0, crowded = -1;
  if (f.kind == Kind::int4_mask) {
    find_chunks(tile, width, chunks);
    values = chunks.values();
    record = mask_record(p, number, values);
    if (!record) return;
    const int64_t end = f.values_at() + values;
    std::memset(record + end, 0, static_cast<size_t>(f.mask_record_bytes(values) - end));
  } else if (f.kind == Kind::int4_out) {
    find_chunks(tile, width, chunks);
    each = f.chunk_values();
    crowded = crowded_rows(chunks, f.n, f.m);
  }
  // First, so that a bad zero, which makes its whole group look kept, is reported as such.
  if (f.group) put_grid(p, rt, ct, tile, record, record + f.zeros_at());
  if (crowded >= 0) return report_pattern(p, rt, ct, crowded);  // its codes would not fit in here
  auto* body = reinterpret_cast<uint32_t*>(record + f.body_at());
  switch (f.kind) {
    case Kind::int4: write_int4(tile, body); break;
    case Kind::int3: write_int3(tile, body); break;
    case Kind::int8: write_int8(tile, body); break;
    case Kind::int4_24: crowded = write_24(tile, width, body); break;
    default: write_chunks(tile, chunks, each, record + f.body_at());
  }
  if (crowded >= 0) report_pattern(p, rt, ct, crowded);
}

// The codes of rows [r0, r1) of a tile. Returns false when an int4_mask's record does not have the
// length its mask asks for.
bool read_tile(const Format& f, const uint8_t* data, int64_t rt, int64_t ct, int r0, int r1,
               Tile& tile) {
  const int width = width_of(f);
  const uint8_t* record = data + record_at(f, data, rt, ct);
  const auto* body = reinterpret_cast<const uint32_t*>(record + f.body_at());
  if (f.group) get_zeros(f, record + f.zeros_at(), tile);
  switch (f.kind) {
    case Kind::int4: read_int4(body, r0, r1, tile); break;
    case Kind::int3: read_int3(body, r0, r1, tile); break;
    case Kind::int8: read_int8(body, r0, r1, tile); break;
    case Kind::int4_24: read_24(body, width, r0, r1, tile); break;
    case Kind::int4_out:
      read_chunks(record + f.body_at(), width, f.chunk_values(), r0, r1, tile);
      break;
    default: {
      Chunks chunks;
      std::memcpy(chunks.mask, body, kMaskBytes);
      if (data + record_at(f, data, rt, ct + 1) != record + f.mask_record_bytes(chunks.values()))
        return false;
      read_chunks(record + f.body_at(), width, 0, r0, r1, tile);
    }
  }
  return true;
}

// W = scale * (code - zero) of n columns of a row.
template <class T>
void put_floats(const uint8_t* codes, int64_t n, float scale, float zero, T* W) {
  const vf s = splat(scale), z = splat(zero);
  for (int64_t k = 0; k < n; k += kLanes) {
    const vb code = *reinterpret_cast<const vb_any*>(codes + k);
    const vf w = s * (__builtin_convertvector(__builtin_convertvector(code, vi), vf) - z);
    if (n - k >= kLanes)
      store(W + k, w);
    else
      store_n(W + k, w, n - k);
  }
}

template <class T>
void put_row(const Format& f, const Tile& tile, const Scales& scales, int r, int64_t ct, T* W) {
  const int64_t cols = std::min<int64_t>(kTileCols, f.cols - ct * kTileCols);
  const int width = width_of(f);
  for (int64_t k = 0; k < cols; k += width) {
    const int64_t q = k / width;
    put_floats(tile.codes[r] + k, std::min<int64_t>(width, cols - k), scales.of[q][r],
               tile.zero[q][r], W + ct * kTileCols + k);
  }
}

template <class T>
void dequantize(const pack::Dequantize& p) {
  const Format& f = p.f;
  const int64_t row_tiles = (p.count + kTileRows - 1) / kTileRows;
  int64_t broken = -1;
  over_spans(f, p.first / kTileRows, row_tiles, [&](int64_t rt, int64_t begin, int64_t end) {
    Tile tile;
    Scales scales;
    if (!f.group) get_row_grid(f, p.data, rt, tile, scales);
    const int64_t top = rt * kTileRows - p.first;
    const int rows = static_cast<int>(std::min<int64_t>(kTileRows, p.count - top));
    for (int64_t ct = begin; ct < end; ++ct) {
      if (f.group) get_scales(f, p.data + record_at(f, p.data, rt, ct), scales);
      if (!read_tile(f, p.data, rt, ct, 0, rows, tile)) report(&broken, rt * f.col_tiles() + ct);
      for (int r = 0; r < rows; ++r)
        put_row(f, tile, scales, r, ct, static_cast<T*>(p.W) + (top + r) * f.cols);
    }
  });
  if (broken >= 0) pack::fail_record(broken);
}

template <class T>
void gather(const pack::Gather& p) {
  const Format& f = p.f;
  int64_t broken = -1;
  cpu::parallel_for(p.count, [&](int64_t i) {
    const int64_t rt = p.indices[i] / kTileRows;
    const int r = static_cast<int>(p.indices[i] % kTileRows);
    Tile tile;
    Scales scales;
    if (!f.group) get_row_grid(f, p.data, rt, tile, scales);
    for (int64_t ct = 0; ct < f.col_tiles(); ++ct) {
      if (f.group) get_scales(f, p.data + record_at(f, p.data, rt, ct), scales);
      if (!read_tile(f, p.data, rt, ct, r, r + 1, tile)) report(&broken, rt * f.col_tiles() + ct);
      put_row(f, tile, scales, r, ct, static_cast<T*>(p.W) + i * f.cols);
    }
  });
  if (broken >= 0) pack::fail_record(broken);
}

}  // namespace

void pack_survey(const pack::Survey& p) {
  over_spans(p.f, 0, p.f.row_tiles(), [&](int64_t rt, int64_t begin, int64_t end) {
    Tile tile;
    Chunks chunks;
    for (int64_t ct = begin; ct < end; ++ct) {
      take_zeros(p.f, p.zeros, rt, ct, tile);
      take_codes(p.f, p.codes, rt, ct, tile);
      find_chunks(tile, width_of(p.f), chunks);
      int64_t* out = p.out + (rt * p.f.col_tiles() + ct) * kSurvey;
      out[kValueBytes] = chunks.values();
      out[kMostOf4Columns] = most_of_columns(chunks);
      out[kMostOf4Rows] = most_of_rows<4>(chunks);
      out[kMostOf8Rows] = most_of_rows<8>(chunks);
    }
  });
}

void pack_write(const pack::Pack& p) {
  const Format& f = p.f;
  over_spans(f, 0, f.row_tiles(), [&](int64_t rt, int64_t begin, int64_t end) {
    Tile tile;
    if (!f.group) {
      take_zeros(f, p.zeros, rt, 0, tile);
      if (begin == 0) put_row_grid(p, rt, tile);
    }
    for (int64_t ct = begin; ct < end; ++ct) {
      if (f.group) take_zeros(f, p.zeros, rt, ct, tile);
      write_tile(p, rt, ct, tile);
    }
  });
}

void pack_read(const pack::Unpack& p) {
  const Format& f = p.f;
  int64_t broken = -1;
  over_spans(f, 0, f.row_tiles(), [&](int64_t rt, int64_t begin, int64_t end) {
    Tile tile;
    Scales unused;
    if (!f.group) {
      get_row_grid(f, p.data, rt, tile, unused);
      if (begin == 0) take_out_row_grid(p, rt);
    }
    const int64_t top = rt * kTileRows;
    const int rows = static_cast<int>(std::min<int64_t>(kTileRows, f.rows - top));
    for (int64_t ct = begin; ct < end; ++ct) {
      if (f.group) take_out_grid(p, rt, ct);
      if (!read_tile(f, p.data, rt, ct, 0, rows, tile)) report(&broken, rt * f.col_tiles() + ct);
      const int64_t left = ct * kTileCols, cols = std::min<int64_t>(kTileCols, f.cols - left);
      for (int r = 0; r < rows; ++r)
        std::memcpy(p.codes + (top + r) * f.cols + left, tile.codes[r], static_cast<size_t>(cols));
    }
  });
  if (broken >= 0) pack::fail_record(broken);
}

void pack_dequantize(const pack::Dequantize& p) {
  distaya::dispatch<float, bf16, f16>(p.dtype, "W", [&]<class T>() { dequantize<T>(p); });
}

void pack_gather(const pack::Gather& p) {
  distaya::dispatch<float, bf16, f16>(p.dtype, "W", [&]<class T>() { gather<T>(p); });
}

}  // namespace distaya::DISTAYA_ISA

#else

namespace distaya::pack {
namespace {

// The three compiled copies of a kernel -> the one for this CPU.
template <class P>
void choose(const P& p, void (*a)(const P&), void (*b)(const P&), void (*c)(const P&)) {
  (cpu::isa() == cpu::Isa::avx512 ? a : cpu::isa() == cpu::Isa::avx2 ? b : c)(p);
}

}  // namespace

void survey_cpu(const Survey& p) {
  choose(p, avx512::pack_survey, avx2::pack_survey, portable::pack_survey);
}

void pack_cpu(const Pack& p) {
  const Format& f = p.f;
  if (f.kind == Kind::int4_mask) {
    check(f.bytes(p.offsets[f.tiles()]) == p.bytes, "data has ", p.bytes, " bytes but its offsets ",
          "say ", f.bytes(p.offsets[f.tiles()]));
    std::memset(p.data, 0, static_cast<size_t>(f.offsets_bytes()));
    std::memcpy(p.data, p.offsets, static_cast<size_t>(f.tiles() + 1) * sizeof(int64_t));
  }
  std::memset(p.data + p.bytes - kTail, 0, kTail);
  choose(p, avx512::pack_write, avx2::pack_write, portable::pack_write);
}

void unpack_cpu(const Unpack& p) {
  choose(p, avx512::pack_read, avx2::pack_read, portable::pack_read);
}

void dequantize_cpu(const Dequantize& p) {
  choose(p, avx512::pack_dequantize, avx2::pack_dequantize, portable::pack_dequantize);
}

void gather_cpu(const Gather& p) {
  choose(p, avx512::pack_gather, avx2::pack_gather, portable::pack_gather);
}

}  // namespace distaya::pack

#endif
