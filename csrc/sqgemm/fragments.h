// Which weight and which activation each lane of a warp hands to each tensor-core instruction, as
// functions of the step that kernels, proofs at compile time and tests share. One warp multiplies
// one packed tile (64 rows x 128 columns, pack/layout.h) by 8 tokens at a time; weights are operand
// A. The columns of a tile are taken in an order that lets every lane use the words it loads whole:
// a sum does not care, as long as operand B follows.
//
// step: int4 and int8 take 8 of m16n8k16 per tile and slab, int4_24 takes 4 of mma.sp m16n8k32.
#pragma once

#include <vector>

#include "pack/layout.h"

namespace distaya::sqgemm {

using pack::Kind;
using pack::Place;

// Tile row that is row `r` of the instruction's 16 in slab 0..3.
DISTAYA_HD constexpr int tile_row(int slab, int r) { return 32 * (r / 8) + 4 * (r % 8) + slab; }

// A line is 32 slots of 16 bytes; a slot holds one word of each slab. This lane's slot of any line:
DISTAYA_HD constexpr int lane_slot(int lane) { return 8 * (lane % 4) + lane / 4; }

// Lines of a body. half: 0 for rows g of a slab, 1 for rows g + 8, g = lane / 4.
DISTAYA_HD constexpr int int4_line(int block32, int half) { return block32 * 2 + half; }

DISTAYA_HD constexpr int int8_line(int block16, int half) { return block16 * 2 + half; }

DISTAYA_HD constexpr int sparse_line(int block64, int half) { return block64 * 2 + half; }

DISTAYA_HD constexpr int meta_line(int block64) { return 4 + block64; }

// Word of the body that this lane hands to slab `slab` from line `line`.
DISTAYA_HD constexpr int lane_word(int line, int lane, int slab) {
  return line * 128 + lane_slot(lane) * 4 + slab;
}

// Tile column of the instruction's column k (0..15, or 0..31 of a sparse step).
DISTAYA_HD constexpr int int4_column(int step, int k) {
  return 32 * (step / 2) + 8 * (k % 8 / 2) + 4 * (step % 2) + 2 * (k / 8) + k % 2;
}

DISTAYA_HD constexpr int int8_column(int step, int k) {
  return 16 * step + 4 * (k % 8 / 2) + 2 * (k / 8) + k % 2;
}

DISTAYA_HD constexpr int sparse_column(int step, int k) {
  const int group = k / 4;
  return 64 * (step / 2) + 16 * (group % 4) + 8 * (step % 2) + 4 * (group / 4) + k % 4;
}

// Where the kernel takes the value of A (row r, column k; of a sparse step: compressed column k)
// from, in the words of lane_word.
DISTAYA_HD constexpr Place int4_place(int step, int slab, int r, int k) {
  const int lane = 4 * (r % 8) + k % 8 / 2, pair = 2 * (step % 2) + k / 8;
  return {lane_word(int4_line(step / 2, r / 8), lane, slab), 4 * (pair + 4 * (k % 2))};
}

DISTAYA_HD constexpr Place int8_place(int step, int slab, int r, int k) {
  const int lane = 4 * (r % 8) + k % 8 / 2, pair = k / 8;
  return {lane_word(int8_line(step, r / 8), lane, slab), 8 * (2 * pair + k % 2)};
}

DISTAYA_HD constexpr Place sparse_place(int step, int slab, int r, int k) {
  const int lane = 4 * (r % 8) + k % 8 / 2, group = 2 * (step % 2) + k / 8;
  return {lane_word(sparse_line(step / 2, r / 8), lane, slab), 4 * (group + 4 * (k % 2))};
}

// Where the hardware finds the indices of the instruction's group 0..7 (columns 4 group ..) of row
// r: in the word of lane 4 (r % 8) + 2 selector + group / 4. selector = step % 2.
DISTAYA_HD constexpr Place sparse_meta_place(int step, int slab, int r, int group) {
  const int lane = 4 * (r % 8) + 2 * (step % 2) + group / 4;
  return {lane_word(meta_line(step / 2), lane, slab), 16 * (r / 8) + 4 * (group % 4)};
}

// Shared memory keeps slots and activations so shuffled that eight neighbouring lanes meet no bank
// twice. Slots of a body: by their quarter (lane % 4) for readers, by their block for writers.
DISTAYA_HD constexpr int shuffled_slot(int slot) {
  return slot ^ (2 * (slot / 8 % 4) | slot / 64 % 2);
}

// The same, of slot first + i where first is a multiple of 64 (or of 32, i < 32).
DISTAYA_HD constexpr int shuffled_slot(int first, int i) {
  return first + (shuffled_slot(i) ^ first / 64 % 2);
}

// 16-byte chunk 0..15 of the 128 activations of a token.
DISTAYA_HD constexpr int shuffled_chunk(int token, int chunk) {
  return chunk ^ (4 * (token & 1) | (token & 2) | (token >> 2 & 1));
}

// Products of a warpgroup (wgmma.cuh) have 64 rows, 16 of each of its four warps. Two of them cover
// a pair of row tiles: warps 0 and 1 supply the upper tile, 2 and 3 the lower one. A lane reads two
// neighbouring words of a slot, one for each product. Which two turns with the lane's row: so the
// 16 lanes that the memory serves at once meet no bank twice (proved below), and the words of a
// row's metadata still lie in the four lanes where the hardware looks for them.
DISTAYA_HD constexpr int pair_slab(int warp, int g) { return 2 * ((warp + g / 2) % 2); }

// Row 0..127 of the pair that is row r (0..15) of this warp's share in product 0 or 1.
DISTAYA_HD constexpr int pair_row(int product, int warp, int r) {
  return 64 * (warp / 2) + tile_row(pair_slab(warp, r % 8) + product, r);
}

// Operand B of such products lies in shared memory in the order of the instructions' columns.
// Tile column at place 0..127 of a token's row:
DISTAYA_HD constexpr int ordered_column(bool sparse, int place) {
  return sparse ? sparse_column(place / 32, place % 32) : int4_column(place / 16, place % 16);
}

// All of this as numbers (fragments.cpp). a [steps][4 slabs][32 lanes][8 values][word, bit], b
// [steps][32 lanes][4 or, sparse, 8 values] = tile columns, meta [steps][4][32] = words, rows
// [4][16], pair_slabs [4 warps][32 lanes] of product 0, pair_rows [2 products][4 warps][16], order
// [128] = ordered_column (int4 and int4_24).
struct Fragments {
  int steps = 0;
  std::vector<int> a, b, meta, rows, pair_slabs, pair_rows, order;
};

Fragments fragments_of(int64_t kind);  // int4, int8 or int4_24

// ---- proofs ----

namespace proof {

constexpr bool same(Place a, Place b) { return a.word == b.word && a.bit == b.bit; }

// f maps 0..n-1 onto 0..n-1.
template <int n, class F>
constexpr bool permutes(const F& f) {
  bool seen[n] = {};
  for (int i = 0; i < n; ++i) {
    const int at = f(i);
    if (at < 0 || at >= n || seen[at]) return false;
    seen[at] = true;
  }
  return true;
}

// The kernel's words are the packer's, for every weight of a tile.
constexpr bool dense_reads_what_pack_wrote() {
  for (int step = 0; step < 8; ++step)
    for (int slab = 0; slab < 4; ++slab)
      for (int r = 0; r < 16; ++r)
        for (int k = 0; k < 16; ++k) {
          const int row = tile_row(slab, r);
          if (!same(int4_place(step, slab, r, k), pack::place_int4(row, int4_column(step, k))))
            return false;
          if (!same(int8_place(step, slab, r, k), pack::place_int8(row, int8_column(step, k))))
            return false;
        }
  return true;
}

constexpr bool sparse_reads_what_pack_wrote() {
  for (int step = 0; step < 4; ++step)
    for (int slab = 0; slab < 4; ++slab)
      for (int r = 0; r < 16; ++r)
        for (int group = 0; group < 8; ++group) {
          const int row = tile_row(slab, r), column = sparse_column(step, 4 * group);
          if (!same(sparse_meta_place(step, slab, r, group), pack::place_24_meta(row, column)))
            return false;
          for (int slot = 0; slot < 2; ++slot)
            if (!same(sparse_place(step, slab, r, 2 * group + slot),
                      pack::place_24(row, column, slot)))
              return false;
        }
  return true;
}

// A lane that reads 8 bytes shares its cycle with the 15 others of its half of the warp: 128 bytes.
constexpr bool pairs_meet_no_bank() {
  for (int line = 0; line < 8; ++line)
    for (int half = 0; half < 8; ++half)  // of warp half / 2
      if (!permutes<16>([&](int i) {
            const int lane = 16 * (half % 2) + i, slot = 32 * line + lane_slot(lane);
            return (2 * shuffled_slot(slot) + pair_slab(half / 2, lane / 4) / 2) % 16;
          }))
        return false;
  return true;
}

static_assert(pairs_meet_no_bank());
static_assert(permutes<128>([](int i) { return pair_row(i / 64, i / 16 % 4, i % 16); }));
static_assert(permutes<128>([](int i) { return ordered_column(false, i); }));
static_assert(permutes<128>([](int i) { return ordered_column(true, i); }));
static_assert(permutes<64>([](int i) { return tile_row(i / 16, i % 16); }));
static_assert(permutes<32>([](int i) { return lane_slot(i); }));
static_assert(permutes<128>([](int i) { return int4_column(i / 16, i % 16); }));
static_assert(permutes<128>([](int i) { return int8_column(i / 16, i % 16); }));
static_assert(permutes<128>([](int i) { return sparse_column(i / 32, i % 32); }));
static_assert(permutes<512>([](int i) { return shuffled_slot(i); }));
static_assert(permutes<512>([](int i) {
  const int at = shuffled_slot(i / 64 * 64, i % 64), same = shuffled_slot(i / 32 * 32, i % 32);
  return at == shuffled_slot(i) && same == at ? i : -1;
}));
static_assert(permutes<128>([](int i) { return i / 16 * 16 + shuffled_chunk(i / 16, i % 16); }));
static_assert(dense_reads_what_pack_wrote());
static_assert(sparse_reads_what_pack_wrote());

}  // namespace proof
}  // namespace distaya::sqgemm
