// A matrix whose rows lie on several ranks, as a kernel that must choose among all of them sees it.
#pragma once

#include <cstdint>
#include <functional>

#include "core/tensor.h"

namespace distaya {

struct AmongOptions {  // as Python says it
  int64_t rank = 0, world = 1;
  int64_t first = 0, total = 0;  // this rank's first row; the rows of all ranks
  std::function<void(int64_t)> exchange;
};

// Every rank has a run of neighbouring rows, in the order of the ranks; some may have none. What
// they tell each other are small tables of counts: exchange(n) puts own[0 .. n) of every rank into
// all [world][n]. It is a collective: all ranks call it as often and with the same n, and from the
// thread that called the door. On CUDA both tables lie on the device, and it is queued on the
// kernels' stream: nothing waits. Counts are integers and exact, so how the rows are dealt out
// cannot show in what is chosen.
struct Among {
  int64_t rank, world, first, total;
  int64_t *own, *all;  // own: zeros on entry
  const std::function<void(int64_t)>* call;

  void exchange(int64_t n) const { (*call)(n); }
};

// tables: int64 [1 + world, most], own and then all.
inline Among read_among(const AmongOptions& o, const Tensor& tables, int64_t most, int64_t rows,
                        const Tensor& like) {
  check(o.world >= 1 && o.rank >= 0 && o.rank < o.world, "rank ", o.rank, " of ", o.world,
        " ranks is none");
  check(o.first >= 0 && o.first + rows <= o.total, rows, " rows from row ", o.first,
        " are not within the ", o.total, " of all ranks");
  const auto [height, width] = tables.shape<2>("tables");
  check(height == o.world + 1 && width == most, "tables (", tables, ") must be [", o.world + 1,
        ", ", most, "]");
  tables.need_contiguous("tables");
  same_device(tables, "tables", like, "the matrix");
  auto* own = tables.as<int64_t>("tables");
  return {o.rank, o.world, o.first, o.total, own, own + most, &o.exchange};
}

// A place among the things of all ranks that were counted by bins.
struct Place {
  int64_t bin, rest;    // the rest-th (from 1) of the things in that bin
  int64_t before, own;  // of these, how many lower ranks have, and this one

  // How many of the first `rest` are this rank's.
  int64_t share() const {
    const int64_t left = rest > before ? rest - before : 0;
    return left < own ? left : own;
  }
};

// Of all [world][pitch], the first n of each being counts: where number `wanted` (from 1) lies,
// counted from bin 0 up, or from the last bin down.
inline Place find_place(const Among& a, int64_t n, int64_t pitch, int64_t wanted, bool down) {
  for (int64_t i = 0; i < n; ++i) {
    Place at{.bin = down ? n - 1 - i : i, .rest = wanted, .before = 0, .own = 0};
    int64_t size = 0;
    for (int64_t r = 0; r < a.world; ++r) {
      const int64_t count = a.all[r * pitch + at.bin];
      if (r < a.rank) at.before += count;
      if (r == a.rank) at.own = count;
      size += count;
    }
    if (wanted <= size) return at;
    wanted -= size;
  }
  fail("the ranks counted ", wanted, " things too few: they do not sweep the same matrix");
}

}  // namespace distaya
