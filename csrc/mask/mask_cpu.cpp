#include <atomic>

#include "mask/mask.h"

#define DISTAYA_ISA_FILE "mask/mask_cpu.cpp"
#include "core/foreach_isa.h"

#ifdef DISTAYA_ISA_PASS

#include "mask/ordered.h"

namespace distaya::DISTAYA_ISA {

void mask_keep_matrix(const mask::KeepK& p);  // matrix_cpu.cpp

namespace {

// Reads n scores as keys, the last vector filled up with the lowest integer, which no cut counts.
// Returns false when one is NaN; low and high become the extreme keys.
bool read_keys(const float* scores, int64_t n, int32_t* keys, int32_t* low, int32_t* high) {
  vi least = vi{} + INT32_MAX, most = vi{} + INT32_MIN, size = {};
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) {
    const vf x = load(scores + j);
    const vi key = ordered(x), a = magnitude(x);
    store_keys(keys + j, key);
    least = key < least ? key : least;
    most = key > most ? key : most;
    size = a > size ? a : size;
  }
  int32_t lo = INT32_MAX, hi = INT32_MIN, biggest = 0;
  for (int l = 0; l < kLanes; ++l) {
    lo = std::min(lo, least[l]);
    hi = std::max(hi, most[l]);
    biggest = std::max(biggest, size[l]);
  }
  for (int64_t j = whole; j < n; ++j) {
    keys[j] = ordered(scores[j]);
    lo = std::min(lo, keys[j]);
    hi = std::max(hi, keys[j]);
    biggest = std::max(biggest, magnitude(scores[j]));
  }
  for (int64_t j = n; j < whole + kLanes; ++j) keys[j] = INT32_MIN;
  *low = lo;
  *high = hi;
  return biggest <= kInfinity;
}

// How many of the n padded keys are >= at.
int64_t count_from(const int32_t* keys, int64_t n, int32_t at) {
  constexpr int kChains = 4;  // independent counters hide the latency of compare and add
  vi count[kChains] = {};
  const vi floor = vi{} + at;
  int64_t j = 0;
  for (; j + kChains * kLanes <= n; j += kChains * kLanes)
    for (int c = 0; c < kChains; ++c) count[c] -= load_keys(keys + j + c * kLanes) >= floor;
  for (; j < n; j += kLanes) count[0] -= load_keys(keys + j) >= floor;
  const vi all = count[0] + count[1] + (count[2] + count[3]);
  int64_t total = 0;
  for (int l = 0; l < kLanes; ++l) total += all[l];
  return total;
}

// Halfway from lo to hi, never lo itself; their distance may exceed int32.
int32_t middle(int32_t lo, int32_t hi) {
  const uint32_t distance = static_cast<uint32_t>(hi) - static_cast<uint32_t>(lo);
  return static_cast<int32_t>(static_cast<uint32_t>(lo) + distance / 2 + (distance & 1));
}

// Binary radix select: the largest key that at least k reach, found bit by bit from the top between
// the extreme keys, or any key that exactly k reach, whichever comes first.
Cut find_cut(const int32_t* keys, int64_t n, int64_t k, int32_t lo, int32_t hi) {
  if (k == 0) return {INT32_MAX, 0};
  if (k == n) return {INT32_MIN, 0};
  int64_t above = 0;  // keys > hi
  while (lo < hi) {
    const int32_t at = middle(lo, hi);
    const int64_t count = count_from(keys, n, at);
    if (count == k) return {at - 1, 0};
    if (count > k) {
      lo = at;
    } else {
      hi = at - 1;
      above = count;
    }
  }
  return {lo, k - above};
}

void keep_rows(const mask::KeepK& p) {
  constexpr int64_t kRows = 16;  // per task, which own one buffer of keys
  cpu::parallel_for((p.rows + kRows - 1) / kRows, [&](int64_t task) {
    const auto keys = cpu::scratch<int32_t>(p.cols + kLanes);
    for (int64_t i = task * kRows; i < std::min(p.rows, (task + 1) * kRows); ++i) {
      const float* scores = p.scores + i * p.cols;
      int32_t lo, hi;
      if (!read_keys(scores, p.cols, keys.get(), &lo, &hi))
        report_nan(p.scores, i * p.cols, (i + 1) * p.cols, p.bad);
      const Cut cut = find_cut(keys.get(), p.cols, p.k, lo, hi);
      write_mask(scores, p.cols, cut, p.mask + i * p.cols);
    }
  });
}

// ---- columns: the same bisection in every lane at once, over a stripe of columns ----

constexpr int64_t kStripe = 32;  // columns: 128 bytes of each row, so rows are read in whole lines
constexpr int kVectors = kStripe / kLanes;

struct Stripe {
  int64_t rows, width;         // width <= kStripe columns are real, the rest repeats the lowest key
  cpu::Scratch<int32_t> keys;  // [rows][kStripe]
  alignas(64) int32_t lo[kStripe], hi[kStripe];  // bracket of each column's cut
  alignas(64) int32_t above[kStripe];            // keys > hi, then Cut::above
  alignas(64) int32_t ties[kStripe];
};

bool read_stripe(const float* scores, int64_t cols, Stripe& s) {
  vi least[kVectors], most[kVectors], size = {};
  for (int v = 0; v < kVectors; ++v) least[v] = vi{} + INT32_MAX, most[v] = vi{} + INT32_MIN;
  for (int64_t i = 0; i < s.rows; ++i)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = s.width - v * kLanes;
      if (left <= 0) continue;
      const float* at = scores + i * cols + v * kLanes;
      const vf x = left >= kLanes ? load(at) : load_n(at, left);
      const vi key = ordered(x), a = magnitude(x);
      store_keys(s.keys.get() + i * kStripe + v * kLanes, key);
      least[v] = key < least[v] ? key : least[v];
      most[v] = key > most[v] ? key : most[v];
      size = a > size ? a : size;
    }
  int32_t biggest = 0;
  for (int l = 0; l < kLanes; ++l) biggest = std::max(biggest, size[l]);
  for (int c = 0; c < kStripe; ++c) {
    s.lo[c] = least[c / kLanes][c % kLanes];
    s.hi[c] = most[c / kLanes][c % kLanes];
  }
  return biggest <= kInfinity;
}

void count_stripe(const Stripe& s, const int32_t* at, int32_t* count) {
  const int vectors = static_cast<int>((s.width + kLanes - 1) / kLanes);
  vi floor[kVectors], sum[kVectors] = {};
  for (int v = 0; v < vectors; ++v) floor[v] = load_keys(at + v * kLanes);
  const int32_t* keys = s.keys.get();
  if (vectors == kVectors)  // the common case, with its counters in registers
    for (int64_t i = 0; i < s.rows; ++i, keys += kStripe)
      for (int v = 0; v < kVectors; ++v) sum[v] -= load_keys(keys + v * kLanes) >= floor[v];
  else
    for (int64_t i = 0; i < s.rows; ++i, keys += kStripe)
      for (int v = 0; v < vectors; ++v) sum[v] -= load_keys(keys + v * kLanes) >= floor[v];
  for (int v = 0; v < vectors; ++v) store_keys(count + v * kLanes, sum[v]);
}

void find_cuts(Stripe& s, int64_t k) {
  for (int c = 0; c < s.width; ++c) {
    s.above[c] = s.ties[c] = 0;
    if (k == 0) s.lo[c] = s.hi[c] = INT32_MAX;
    if (k == s.rows) s.lo[c] = s.hi[c] = INT32_MIN, s.above[c] = static_cast<int32_t>(k);
  }
  alignas(64) int32_t at[kStripe] = {}, count[kStripe];
  while (true) {
    bool open = false;
    for (int c = 0; c < s.width; ++c) {
      at[c] = s.lo[c] < s.hi[c] ? middle(s.lo[c], s.hi[c]) : s.hi[c];
      open |= s.lo[c] < s.hi[c];
    }
    if (!open) break;
    count_stripe(s, at, count);
    for (int c = 0; c < s.width; ++c) {
      if (s.lo[c] >= s.hi[c]) continue;
      if (count[c] == k) {
        s.lo[c] = s.hi[c] = at[c] - 1;
        s.above[c] = count[c];
      } else if (count[c] > k) {
        s.lo[c] = at[c];
      } else {
        s.hi[c] = at[c] - 1;
        s.above[c] = count[c];
      }
    }
  }
  for (int c = 0; c < s.width; ++c) s.ties[c] = static_cast<int32_t>(k) - s.above[c];
}

void write_stripe(const Stripe& s, int64_t cols, uint8_t* mask) {
  const int vectors = static_cast<int>((s.width + kLanes - 1) / kLanes);
  vi above[kVectors], ties[kVectors];
  for (int v = 0; v < vectors; ++v) {
    above[v] = load_keys(s.lo + v * kLanes);
    ties[v] = load_keys(s.ties + v * kLanes);
  }
  for (int64_t i = 0; i < s.rows; ++i)
    for (int v = 0; v < vectors; ++v) {
      const vi key = load_keys(s.keys.get() + i * kStripe + v * kLanes);
      const vi tie = (key == above[v]) & (ties[v] > 0);
      ties[v] += tie;
      store_mask_n(mask + i * cols + v * kLanes, (key > above[v]) | tie,
                   std::min<int64_t>(kLanes, s.width - v * kLanes));
    }
}

void keep_columns(const mask::KeepK& p) {
  cpu::parallel_for((p.cols + kStripe - 1) / kStripe, [&](int64_t task) {
    const int64_t first = task * kStripe;
    Stripe s{};
    s.rows = p.rows;
    s.width = std::min(kStripe, p.cols - first);
    s.keys = cpu::scratch<int32_t>(p.rows * kStripe);
    if (!read_stripe(p.scores + first, p.cols, s))
      for (int64_t i = 0; i < p.rows; ++i)
        report_nan(p.scores, i * p.cols + first, i * p.cols + first + s.width, p.bad);
    find_cuts(s, p.k);
    write_stripe(s, p.cols, p.mask + first);
  });
}

}  // namespace

void mask_keep_k(const mask::KeepK& p) {
  switch (p.along) {
    case mask::Along::row: return keep_rows(p);
    case mask::Along::column: return keep_columns(p);
    default: return mask_keep_matrix(p);
  }
}

}  // namespace distaya::DISTAYA_ISA

#else

namespace distaya::mask {

void keep_k_cpu(const KeepK& p) {
  switch (cpu::isa()) {
    case cpu::Isa::avx512: return avx512::mask_keep_k(p);
    case cpu::Isa::avx2: return avx2::mask_keep_k(p);
    default: return portable::mask_keep_k(p);
  }
}

}  // namespace distaya::mask

#endif
