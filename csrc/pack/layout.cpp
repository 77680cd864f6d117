// Proofs, at compile time, of what layout.h says: every bit of a body belongs to one code, and the
// readers find theirs where its comments promise.
#include "pack/layout.h"

namespace distaya::pack {
namespace {

// Slots of `width` bits in `words` words, each of which must be taken exactly once.
template <int kSlots>
struct Slots {
  bool taken[kSlots] = {};
  int count = 0;
  bool good = true;

  constexpr void take(int first_word, Place at, int width) {
    const int word = at.word - first_word;
    const int slot = word * (32 / width) + at.bit / width;
    if (word < 0 || at.bit < 0 || at.bit % width || at.bit >= 32 || slot >= kSlots || taken[slot]) {
      good = false;
    } else {
      taken[slot] = true;
      ++count;
    }
  }

  constexpr bool all() const { return good && count == kSlots; }
};

template <class Body>
constexpr void over_tile(const Body& body, int step = 1) {
  for (int r = 0; r < kTileRows; ++r)
    for (int k = 0; k < kTileCols; k += step) body(r, k);
}

template <class PlaceOf>
constexpr bool fills(int first_word, int width, const PlaceOf& place_of) {
  Slots<kTileWeights> slots;
  over_tile([&](int r, int k) { slots.take(first_word, place_of(r, k), width); });
  return slots.all();
}

static_assert(fills(0, 4, [](int r, int k) { return place_int4(r, k); }));
static_assert(fills(0, 8, [](int r, int k) { return place_int8(r, k); }));
static_assert(fills(0, 2, [](int r, int k) { return place_int3_low(r, k); }));
static_assert(fills(512, 1, [](int r, int k) { return place_int3_high(r, k); }));

constexpr bool fills_24() {
  Slots<kTileWeights / 2> codes;
  Slots<kTileWeights / 4> meta;
  over_tile(
      [&](int r, int k) {
        for (int slot = 0; slot < 2; ++slot) codes.take(0, place_24(r, k, slot), 4);
        meta.take(512, place_24_meta(r, k), 4);
        for (int i = 1; i < 4; ++i)  // all four columns of a group name the same places
          if (place_24(r, k + i, 0).word != place_24(r, k, 0).word ||
              place_24_meta(r, k + i).bit != place_24_meta(r, k).bit)
            codes.good = false;
      },
      4);
  return codes.all() && meta.all();
}

static_assert(fills_24());

constexpr bool fills_chunks() {
  bool taken[kTileWeights] = {}, good = true;
  over_tile([&](int r, int k) {
    const int bit = chunk_of(r, k) * 64 + chunk_bit(r, k);
    good = good && bit >= 0 && bit < kTileWeights && !taken[bit];
    if (good) taken[bit] = true;
  });
  return good;
}

static_assert(fills_chunks());

// A warp: slot 8c + g of a line of 512 bytes holds columns `quarter c` of the rows 4g + j.
constexpr bool lines_serve_warps() {
  for (int block = 0; block < 4; ++block)
    for (int half = 0; half < 2; ++half)
      for (int c = 0; c < 4; ++c)
        for (int g = 0; g < 8; ++g)
          for (int j = 0; j < 4; ++j) {
            const int line = block * 2 + half, word = line * 128 + (8 * c + g) * 4 + j;
            if (word_of(block, c, 32 * half + 4 * g + j) != word) return false;
          }
  return true;
}

static_assert(lines_serve_warps());

// A CPU vector: 16 consecutive rows of the same columns are consecutive words on a 64-byte line.
constexpr bool vectors_serve_cpus() {
  bool good = true;
  over_tile([&](int r, int k) {
    const int r0 = r / 16 * 16, i = r % 16;
    good = good && place_int4(r, k).word == place_int4(r0, k).word + i &&
           place_int8(r, k).word == place_int8(r0, k).word + i &&
           place_int3_low(r, k).word == place_int3_low(r0, k).word + i &&
           place_int3_high(r, k).word == place_int3_high(r0, k).word + i &&
           place_24(r, k, 1).word == place_24(r0, k, 0).word + i &&
           place_int4(r0, k).word % 16 == 0 && place_int8(r0, k).word % 16 == 0 &&
           place_int3_low(r0, k).word % 16 == 0 && place_int3_high(r0, k).word % 16 == 0 &&
           place_24(r0, k, 0).word % 16 == 0;
  });
  return good;
}

static_assert(vectors_serve_cpus());

// The masks that decoders use: one shift and one AND give four neighbouring columns.
constexpr bool fields_line_up() {
  bool good = true;
  over_tile([&](int r, int k) {
    good = good && place_int4(r, k).bit == 4 * (k % 8 / 2) + 16 * (k % 2) &&
           place_int3_low(r, k).bit == 2 * (k % 16 / 4) + 8 * (k % 4) &&
           place_int3_high(r, k).bit == k % 32 / 4 + 8 * (k % 4);
  });
  return good;
}

static_assert(fields_line_up());

// mma.sp: the word of lane 4g + i for slab j of a 64-column block. Its low half is row 4g + j, its
// high half row 32 + 4g + j; nibble q is group i of columns 16 q.
constexpr bool metadata_serves_warps() {
  for (int block = 0; block < 2; ++block)
    for (int i = 0; i < 4; ++i)
      for (int g = 0; g < 8; ++g)
        for (int j = 0; j < 4; ++j)
          for (int q = 0; q < 4; ++q) {
            const int word = 512 + (block * 4 + i) * 32 + 4 * g + j,
                      k = 64 * block + 16 * q + 4 * i;
            const Place low = place_24_meta(4 * g + j, k), high = place_24_meta(32 + 4 * g + j, k);
            if (low.word != word || high.word != word || low.bit != 4 * q || high.bit != 16 + 4 * q)
              return false;
          }
  return true;
}

static_assert(metadata_serves_warps());

// Everything inside a record, and every record of fixed size, begins on a multiple of 64 bytes.
constexpr bool records_are_aligned() {
  const Dtype scales[] = {Dtype::f32, Dtype::bf16, Dtype::f16};
  const int64_t groups[] = {0, 32, 64, 128};
  for (int kind = 0; kind < 6; ++kind)
    for (const int64_t group : groups)
      for (const Dtype scale : scales)
        for (int symmetric = 0; symmetric < 2; ++symmetric)
          for (int m = 2; m <= 16; m *= 2)
            for (int n = 1; n < m; ++n) {
              Format f{static_cast<Kind>(kind), 100, 300, group, symmetric == 1, scale, n, m};
              if (f.zeros_at() % 64 || f.body_at() % 64 || f.offsets_bytes() % 64) return false;
              if (f.kind != Kind::int4_mask && f.record_bytes() % 64) return false;
              if (f.chunk_values() * 2 * m != 64 * n) return false;
              if (f.row_section_bytes() % 64) return false;
            }
  return true;
}

static_assert(records_are_aligned());

}  // namespace
}  // namespace distaya::pack
