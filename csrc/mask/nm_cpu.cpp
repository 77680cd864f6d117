#include <atomic>

#include "mask/mask.h"

#define DISTAYA_ISA_FILE "mask/nm_cpu.cpp"
#include "core/foreach_isa.h"

#ifdef DISTAYA_ISA_PASS

#include "mask/ordered.h"

namespace distaya::DISTAYA_ISA {
namespace {

constexpr int kMost = 32;  // largest group

// kLanes groups side by side: key[i] holds the i-th member of each. On return keep[i] is -1 where
// that member is among the n best: each pair is compared once and the loser's rank grows; of equals
// the earlier wins. M = 0 takes m at run time; otherwise the loops unroll into registers.
template <int M>
DISTAYA_INLINE void rank_groups(const vi* key, int m, int n, vi* keep) {
  const int size = M ? M : m;
  vi rank[M ? M : kMost];
#pragma GCC unroll 8
  for (int i = 0; i < size; ++i) {
    rank[i] = vi{} + i;
#pragma GCC unroll 8
    for (int j = 0; j < i; ++j) {
      const vi later_wins = key[i] > key[j];
      rank[i] += later_wins;
      rank[j] -= later_wins;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < size; ++i) keep[i] = rank[i] < n;
}

// a0 b0 a1 b1 ... -> the even or the odd elements of two vectors, and back.
struct Shuffles {
  vi even, odd, low, high;

  Shuffles() {
    for (int l = 0; l < kLanes; ++l) {
      even[l] = 2 * l;
      odd[l] = 2 * l + 1;
      low[l] = l / 2 + (l & 1) * kLanes;
      high[l] = low[l] + kLanes / 2;
    }
  }
};

// M (a power of two) vectors of consecutive elements -> vector i holds member i of kLanes groups.
// Each round takes the flat array's even elements, then its odd ones: the index's lowest bit moves
// to its top, and after log2(M) rounds the place inside the group numbers the vectors.
template <int M>
DISTAYA_INLINE void to_members(vi* x, const Shuffles& by) {
#pragma GCC unroll 5
  for (int round = M; round > 1; round /= 2) {
    vi y[M];
#pragma GCC unroll 16
    for (int i = 0; i < M / 2; ++i) {
      y[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], by.even);
      y[i + M / 2] = __builtin_shuffle(x[2 * i], x[2 * i + 1], by.odd);
    }
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i) x[i] = y[i];
  }
}

template <int M>
DISTAYA_INLINE void from_members(vi* x, const Shuffles& by) {
#pragma GCC unroll 5
  for (int round = M; round > 1; round /= 2) {
    vi y[M];
#pragma GCC unroll 16
    for (int i = 0; i < M / 2; ++i) {
      y[2 * i] = __builtin_shuffle(x[i], x[i + M / 2], by.low);
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + M / 2], by.high);
    }
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i) x[i] = y[i];
  }
}

// kLanes consecutive groups of M: M whole vectors in, M out. Returns the largest magnitudes.
template <int M>
DISTAYA_INLINE vi tile_shuffled(const float* scores, int n, uint8_t* mask, const Shuffles& by) {
  vi key[M], keep[M], size = {};
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) {
    const vf x = load(scores + i * kLanes);
    const vi a = magnitude(x);
    size = a > size ? a : size;
    key[i] = ordered(x);
  }
  to_members<M>(key, by);
  rank_groups<M>(key, M, n, keep);
  from_members<M>(keep, by);
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) store_mask(mask + i * kLanes, keep[i]);
  return size;
}

// Any m: members are gathered one by one. `groups` <= kLanes of them are real.
vi tile_gathered(const float* scores, int m, int n, int64_t groups, uint8_t* mask) {
  vi key[kMost] = {}, keep[kMost], size = {};
  for (int64_t g = 0; g < groups; ++g)
    for (int i = 0; i < m; ++i) {
      key[i][g] = ordered(scores[g * m + i]);
      size[g] = std::max(size[g], magnitude(scores[g * m + i]));
    }
  rank_groups<0>(key, m, n, keep);
  for (int64_t g = 0; g < groups; ++g)
    for (int i = 0; i < m; ++i) mask[g * m + i] = keep[i][g] & 1;
  return size;
}

// Groups along a row never straddle rows (cols % m == 0), so the matrix is one flat run of them.
template <int M>
void keep_inputs(const mask::KeepNM& p) {
  const int64_t groups = p.rows * (p.cols / p.m), tiles = (groups + kLanes - 1) / kLanes;
  const int64_t per_task = std::max<int64_t>(1, (1 << 14) / (p.m * kLanes));
  const Shuffles by;
  cpu::parallel_for((tiles + per_task - 1) / per_task, [&](int64_t task) {
    vi size = {};
    const int64_t last = std::min(tiles, (task + 1) * per_task);
    for (int64_t t = task * per_task; t < last; ++t) {
      const int64_t here = std::min<int64_t>(kLanes, groups - t * kLanes), at = t * kLanes * p.m;
      vi a;
      if constexpr (M > 0)
        a = here == kLanes ? tile_shuffled<M>(p.scores + at, p.n, p.mask + at, by)
                           : tile_gathered(p.scores + at, p.m, p.n, here, p.mask + at);
      else
        a = tile_gathered(p.scores + at, p.m, p.n, here, p.mask + at);
      size = a > size ? a : size;
    }
    if (any(size > kInfinity))
      report_nan(p.scores, task * per_task * kLanes * p.m, std::min(groups, last * kLanes) * p.m,
                 p.bad);
  });
}

// Groups down a column: m rows are read side by side, kLanes columns at a time.
template <int M>
void keep_outputs(const mask::KeepNM& p) {
  cpu::parallel_for(p.rows / p.m, [&](int64_t group) {
    const int64_t top = group * p.m * p.cols;
    const int m = M ? M : p.m;
    vi key[M ? M : kMost], keep[M ? M : kMost], size = {};
    for (int64_t j = 0; j < p.cols; j += kLanes) {
      const int64_t width = std::min<int64_t>(kLanes, p.cols - j);
      for (int i = 0; i < m; ++i) {
        const float* at = p.scores + top + i * p.cols + j;
        const vf x = width == kLanes ? load(at) : load_n(at, width);
        const vi a = magnitude(x);
        size = a > size ? a : size;
        key[i] = ordered(x);
      }
      rank_groups<M>(key, m, p.n, keep);
      for (int i = 0; i < m; ++i) store_mask_n(p.mask + top + i * p.cols + j, keep[i], width);
    }
    if (any(size > kInfinity)) report_nan(p.scores, top, top + p.m * p.cols, p.bad);
  });
}

template <int M>
void keep_groups(const mask::KeepNM& p) {
  if (p.of_outputs)
    keep_outputs<M>(p);
  else
    keep_inputs<M>(p);
}

}  // namespace

void mask_keep_nm(const mask::KeepNM& p) {
  switch (p.m) {
    case 2: return keep_groups<2>(p);
    case 4: return keep_groups<4>(p);
    case 8: return keep_groups<8>(p);
    case 16: return keep_groups<16>(p);
    case 32: return keep_groups<32>(p);
    default: return keep_groups<0>(p);
  }
}

}  // namespace distaya::DISTAYA_ISA

#else

namespace distaya::mask {

void keep_nm_cpu(const KeepNM& p) {
  switch (cpu::isa()) {
    case cpu::Isa::avx512: return avx512::mask_keep_nm(p);
    case cpu::Isa::avx2: return avx2::mask_keep_nm(p);
    default: return portable::mask_keep_nm(p);
  }
}

}  // namespace distaya::mask

#endif
