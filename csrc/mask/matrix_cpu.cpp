// Exact k of a whole matrix: one histogram of the keys' high 16 bits, one of the low 16 bits of
// those in the cut's bin, and the ties dealt out chunk by chunk.
#include <atomic>
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
  const int64_t parts = std::min<int64_t>(cpu::threads(), chunks);
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

// The bin that holds the k-th largest; k becomes its rank inside the bin.
uint32_t pick(const std::vector<int64_t>& bins, int64_t& k) {
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
  std::vector<int64_t> ties(chunks, 0);
  int32_t above = INT32_MAX;
  if (p.k > 0) {
    const uint32_t top = pick(high, rank);
    const auto low = low_bits(p, top);
    const uint32_t bottom = pick(low, rank);
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
