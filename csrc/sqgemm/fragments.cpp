// The tables of fragments.h as numbers, for the tests that multiply through them.
#include "sqgemm/fragments.h"

#include "core/check.h"

namespace distaya::sqgemm {

Fragments fragments_of(int64_t kind) {
  const auto k = static_cast<Kind>(kind);
  check(k == Kind::int4 || k == Kind::int8 || k == Kind::int4_24,
        "fragments are read of kinds int4, int8 and int4-2:4, not of kind number ", kind);
  const bool sparse = k == Kind::int4_24;
  Fragments out;
  out.steps = sparse ? 4 : 8;
  for (int step = 0; step < out.steps; ++step) {
    for (int slab = 0; slab < 4; ++slab)
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 8; ++i) {  // value i % 2 of register i / 2
          const int r = lane / 4 + 8 * (i / 2 % 2), column = lane % 4 * 2 + 8 * (i / 4) + i % 2;
          const Place at = sparse            ? sparse_place(step, slab, r, column)
                           : k == Kind::int8 ? int8_place(step, slab, r, column)
                                             : int4_place(step, slab, r, column);
          out.a.push_back(at.word);
          out.a.push_back(at.bit);
        }
        if (sparse) out.meta.push_back(lane_word(meta_line(step / 2), lane, slab));
      }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < (sparse ? 8 : 4); ++i) {
        const int row = lane % 4 * 2 + 8 * (i / 2) + i % 2;
        out.b.push_back(sparse            ? sparse_column(step, row)
                        : k == Kind::int8 ? int8_column(step, row)
                                          : int4_column(step, row));
      }
  }
  for (int slab = 0; slab < 4; ++slab)
    for (int r = 0; r < 16; ++r) out.rows.push_back(tile_row(slab, r));
  for (int i = 0; i < 4 * 32; ++i) out.pair_slabs.push_back(pair_slab(i / 32, i % 32 / 4));
  for (int i = 0; i < 2 * 64; ++i) out.pair_rows.push_back(pair_row(i / 64, i / 16 % 4, i % 16));
  if (k != Kind::int8)
    for (int i = 0; i < pack::kTileCols; ++i) out.order.push_back(ordered_column(sparse, i));
  return out;
}

}  // namespace distaya::sqgemm
