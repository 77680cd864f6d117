// Exact k of a whole matrix: one histogram of the keys' high 16 bits, one of the low 16 bits of
// those in the cut's bin, and the ties dealt out chunk by chunk.
#include <atomic>
#include <numeric>
#include <vector>

#include "mask/mask.h"

#define DISTAYA_ISA_FILE "mask/matrix_cpu.cpp"
#include "core/foreach_isa.h"

#ifdef DISTAYA_ISA_PASS

#include "mask/ordered.h"

namespace distaya::DISTAYA_ISA {
namespace {

constexpr int64_t kBins = 1 << 16;
constexpr int64_t kChunk = 1 << 16;  // scores per task

// Adds body(vector of unsigned keys, histogram) over all chunks into one histogram of kBins.
// Counts are integers: the order in which threads finish cannot show.
template <class Body>
std::vector<int64_t> histogram(const mask::KeepK& p, const Body& body) {
  const int64_t size = p.rows * p.cols, chunks = (size + kChunk - 1) / kChunk;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(cpu::threads(), chunks));
  std::vector<int64_t> bins(static_cast<size_t>(parts * kBins));
  cpu::parallel_for(parts, [&](int64_t part) {
    int64_t* mine = bins.data() + part * kBins;
    for (int64_t c = part; c < chunks; c += parts)
      body(c * kChunk, std::min(size, (c + 1) * kChunk), mine);
  });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t b = 0; b < kBins; ++b) bins[b] += bins[part * kBins + b];
  return bins;
}

constexpr uint32_t kTop = 0x80000000u;  // turns a signed key into one that sorts unsigned

// Lowers *bad, a place in the whole matrix, to the lowest of all ranks.
void share_bad(const Among& a, int64_t* bad) {
  for (int64_t r = 0; r < a.world; ++r) {
    const int64_t theirs = a.all[r * mask::kTable + mask::kTable - 1];
    if (static_cast<uint64_t>(theirs) < static_cast<uint64_t>(*bad)) *bad = theirs;
  }
}

// pick() over the bins of all ranks, whose 16 bits go by two exchanges of 8: k becomes how many of
// the bin are this rank's to keep, if it is the last digit, else the rank inside the bin.
uint32_t pick_among(const mask::KeepK& p, const std::vector<int64_t>& bins, bool last, int64_t& k) {
  constexpr int64_t kDigits = mask::kTable - 1, kEach = kBins / kDigits;
  const Among& a = *p.among;
  int64_t high = 0;
  for (const bool fine : {false, true}) {
    for (int64_t d = 0; d < kDigits; ++d) {
      const int64_t* from = bins.data() + (fine ? high * kEach + d : d * kEach);
      a.own[d] = std::accumulate(from, from + (fine ? 1 : kEach), int64_t{0});
    }
    a.own[kDigits] = *p.bad;
    a.exchange(mask::kTable);
    share_bad(a, p.bad);
    const Place at = find_place(a, kDigits, mask::kTable, k, true);
    k = fine && last ? at.share() : at.rest;
    high = high * kDigits + at.bin;
  }
  return static_cast<uint32_t>(high);
}

// The bin that holds the k-th largest; k becomes its rank inside the bin.
uint32_t pick(const mask::KeepK& p, const std::vector<int64_t>& bins, bool last, int64_t& k) {
  if (p.among) return pick_among(p, bins, last, k);
  uint32_t b = kBins - 1;
  while (bins[b] < k) k -= bins[b--];
  return b;
}

std::vector<int64_t> high_bits(const mask::KeepK& p) {
  return histogram(p, [&](int64_t from, int64_t to, int64_t* bins) {
    alignas(64) int32_t keys[kLanes];
    vi size = {};
    int64_t j = from;
    for (; j + kLanes <= to; j += kLanes) {
      const vf x = load(p.scores + j);
      const vi a = magnitude(x);
      size = a > size ? a : size;
      store_keys(keys, (vi)(((vu)ordered(x) ^ kTop) >> 16));
      for (int l = 0; l < kLanes; ++l) ++bins[keys[l]];
    }
    int32_t biggest = 0;
    for (int l = 0; l < kLanes; ++l) biggest = std::max(biggest, size[l]);
    for (; j < to; ++j) {
      biggest = std::max(biggest, magnitude(p.scores[j]));
      ++bins[(static_cast<uint32_t>(ordered(p.scores[j])) ^ kTop) >> 16];
    }
    if (biggest > kInfinity) report_nan(p.scores, from, to, p.bad);
  });
}

std::vector<int64_t> low_bits(const mask::KeepK& p, uint32_t high) {
  return histogram(p, [&](int64_t from, int64_t to, int64_t* bins) {
    const auto add = [&](int64_t j) {
      const uint32_t key = static_cast<uint32_t>(ordered(p.scores[j])) ^ kTop;
      if (key >> 16 == high) ++bins[key & 0xffff];
    };
    int64_t j = from;
    for (; j + kLanes <= to; j += kLanes)
      if (any((vi)((((vu)ordered(load(p.scores + j)) ^ kTop) >> 16) == high)))
        for (int l = 0; l < kLanes; ++l) add(j + l);
    for (; j < to; ++j) add(j);
  });
}

}  // namespace

void mask_keep_matrix(const mask::KeepK& p) {
  const int64_t size = p.rows * p.cols, chunks = (size + kChunk - 1) / kChunk;
  int64_t rank = p.k;
  const auto high = high_bits(p);  // also looks for NaN, so even for k = 0
  if (p.among && *p.bad >= 0) *p.bad += p.among->first * p.cols;
  std::vector<int64_t> ties(chunks, 0);
  int32_t above = INT32_MAX;
  if (p.k > 0 || p.among) {  // other ranks may have found a NaN
    const uint32_t top = pick(p, high, false, rank);
    const auto low = low_bits(p, top);
    const uint32_t bottom = pick(p, low, true, rank);
    above = static_cast<int32_t>((top << 16 | bottom) ^ kTop);
    if (rank == low[bottom]) {
      ties.assign(chunks, kChunk);  // all ties stay
    } else {
      cpu::parallel_for(chunks, [&](int64_t c) {
        for (int64_t j = c * kChunk; j < std::min(size, (c + 1) * kChunk); ++j)
          ties[c] += ordered(p.scores[j]) == above;
      });
      for (int64_t c = 0; c < chunks; ++c) {
        ties[c] = std::min(ties[c], rank);
        rank -= ties[c];
      }
    }
  }
  cpu::parallel_for(chunks, [&](int64_t c) {
    const int64_t from = c * kChunk, n = std::min(kChunk, size - from);
    write_mask(p.scores + from, n, {above, ties[c]}, p.mask + from);
  });
}

}  // namespace distaya::DISTAYA_ISA

#endif
