// How the tensor-core SYRK (syrk.cuh) brings X, Y and the weights to a block.
#pragma once

#include "core/ptx.cuh"
#include "hessian/hessian.h"
#include "hessian/syrk_tile.h"

namespace distaya::syrk {

constexpr int kSlice = kCudaRun;  // most tokens in one stage of shared memory
constexpr int kStages = 4;
constexpr int kThreads = 256;
constexpr int kChunk = 8;         // elements in 16 bytes
constexpr int kRow = 2 * kPanel;  // bytes of a token in a panel
constexpr int kPanelBytes = kSlice * kRow;
constexpr int kStageBytes = 3 * kPanelBytes;
constexpr int kSharedBytes = kStages * kStageBytes;  // 96 KB; sm_86, 89 and 120 have 99 for a block
static_assert(kSlice == 32, "a lane for each token");

// Up to 32 consecutive tokens of one weight, tokens of weight 0 among them left out.
struct Slice {
  int tokens;    // 0: X has ended
  float weight;  // 0: there is nothing to multiply
};

// Where the 64 x 64 elements of H are that a warp computes. Some are nowhere in H, or in its upper
// triangle: such a warp multiplies what is at hand, as idle it would save no time, but leaves H
// alone.
struct alignas(32) Place {
  int rows, columns;  // their channels, in bytes from the beginning of a stage on
  int i0, j0;
  bool inside;
};

// What all threads of a block know, beside X.
struct Common {
  int column;  // first one of the first panel
  int right;   // first one of X's panel of a cross moment
  unsigned
      beyond[2];  // bytes from the first to the others; more than a token has for one not there
  Place place[kThreads / 32];
  Slice slice[kStages];
};

template <bool cross>
__device__ inline Place place_of(const Tile& tile, int warp, int64_t K, int64_t C) {
  const int i = warp / 2 % 2 * 64, j = warp % 2 * 64;
  const auto panel = [&](int k) {
    return k == 0 ? tile.panel[0] : k == 1 ? tile.panel[1] : tile.panel[2];
  };
  const bool there = panel(warp / 4) >= 0;
  const int row = there ? warp / 4 : 0, column = row ? tile.columns[1] : tile.columns[0];
  const int i0 = panel(row) * kPanel + i, j0 = panel(column) * kPanel + j;
  return {row * kPanelBytes + 2 * i, column * kPanelBytes + 2 * j, i0, j0,
          there && (cross ? i0 < K : i0 <= j0) && j0 < C};
}

// Called by a thread for each warp.
template <bool cross>
__device__ inline void prepare(Common& common, const Hessian& p) {
  const int rows = static_cast<int>(cuda::ceil_div<int64_t>(p.K, kPanel));
  const int panels = static_cast<int>(cuda::ceil_div<int64_t>(p.C, kPanel));
  const Tile tile = cross ? cross_tile_of(blockIdx.x, rows, panels) : tile_of(blockIdx.x, panels);
  const int thread = static_cast<int>(threadIdx.x);
  common.place[thread] = place_of<cross>(tile, thread, p.K, p.C);
  if (thread != 0) return;
  common.column = tile.panel[0] * kPanel;
  common.right = tile.panel[2] * kPanel;
  for (int k = 1; k < 3 - cross; ++k)
    common.beyond[k - 1] = tile.panel[k] < 0 ? 1u << 30 : (tile.panel[k] - tile.panel[0]) * kRow;
}

// The first n (any number) of 8 elements from x on, then zeros; x lies on any element.
__device__ inline uint4 gather(const uint16_t* x, int n) {
  if (n >= kChunk && reinterpret_cast<uintptr_t>(x) % 4 == 0) {
    const auto* word = reinterpret_cast<const uint32_t*>(x);
    return {word[0], word[1], word[2], word[3]};
  }
  if (n >= kChunk) {
    const auto* word = reinterpret_cast<const uint32_t*>(x + 1);
    const uint32_t first = x[0], a = word[0], b = word[1], c = word[2], last = x[7];
    return {first | a << 16, a >> 16 | b << 16, b >> 16 | c << 16, c >> 16 | last << 16};
  }
  uint32_t v[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) v[i] = i < n ? x[i] : 0;
  return {v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16};
}

// Cuts X into slices and brings them to shared memory. A stage holds 3 panels [32 tokens][128
// channels]; chunk c of 16 bytes of a token lies at c ^ token % 8, so that ldmatrix, which reads
// one chunk of 8 tokens at a time, meets every bank once. Tokens left out are not read: zeros lie
// there, as beyond the last token of the slice and the last channel. aligned: every row of X begins
// at a multiple of 16 bytes; if not, the copies are ordinary ones, through registers.
template <class T, bool aligned, bool cross>
class Loader {
 public:
  __device__ Loader(const Hessian& p, Common& common, char* shared)
      : p_(p), common_(common), shared_(shared), weight_(weight_ahead()) {}

  // The next slice; all warps cut alike.
  __device__ void load(int stage) {
    Slice slice{};
    if (t_ < static_cast<int>(p_.T)) {
      const unsigned some = __ballot_sync(cuda::kFullWarp, weight_ != 0);
      const unsigned first = some & -some;
      slice.weight = __shfl_sync(cuda::kFullWarp, weight_, some ? __ffs(first) - 1 : 0);
      const bool other = weight_ != 0 && weight_ != slice.weight;  // NaN too, but for the first
      const unsigned end = __ballot_sync(cuda::kFullWarp, other) & ~first;
      slice.tokens = end ? __ffs(end) - 1 : kSlice;
      copy(stage, some & (end ? (end & -end) - 1 : ~0u));
      t_ += slice.tokens;
      weight_ = weight_ahead();  // a slice before it is needed
    }
    if (threadIdx.x == 0) common_.slice[stage] = slice;
    ptx::copy_commit();
  }

 private:
  __device__ float weight_ahead() const {
    const int t = t_ + static_cast<int>(threadIdx.x) % 32;
    return t >= static_cast<int>(p_.T) ? 0.f : p_.weights ? p_.weights[t] : 1.f;
  }

  // Tokens t_ .. t_ + 31, of which those whose bit is set are read.
  __device__ void copy(int stage, unsigned tokens) const {
    const int chunk = threadIdx.x % 16, token = static_cast<int>(threadIdx.x) / 16;
    const int64_t wide = cross ? p_.K : p_.C, at = t_ + token;
    const int column = common_.column + chunk * kChunk, right = common_.right + chunk * kChunk;
    const auto* from = address(cross ? p_.Y : p_.X, at * wide + column);
    const auto* other = address(p_.X, at * p_.C + right);  // of a cross moment
    char* to = shared_ + stage * kStageBytes + token * kRow + 16 * (chunk ^ token % 8);
    // Bytes from there on.
    const int row = 2 * static_cast<int>(wide - column), rest = 2 * static_cast<int>(p_.C - right);
    const unsigned beyond[3] = {0, common_.beyond[0], cross ? 0 : common_.beyond[1]};
#pragma unroll(aligned ? 2 : 1)
    for (int i = 0; i < 2; ++i) {
      const bool there = tokens >> (token + 16 * i) & 1;
      const int left = there ? row : 0;
#pragma unroll
      for (int k = 0; k < 3 - cross; ++k)
        copy(to + k * kPanelBytes, from + beyond[k], left - static_cast<int>(beyond[k]));
      if constexpr (cross) copy(to + 2 * kPanelBytes, other, there ? rest : 0);
      from += 32 * wide, other += 32 * p_.C, to += 16 * kRow;
    }
  }

  __device__ static const char* address(const void* X, int64_t element) {
    return reinterpret_cast<const char*>(static_cast<const T*>(X) + element);
  }

  // A chunk, of which `left` bytes exist, if any.
  __device__ static void copy(char* to, const char* from, int left) {
    if constexpr (aligned)
      ptx::copy_async_or_zero(to, from, left > 0);
    else
      *reinterpret_cast<uint4*>(to) = gather(reinterpret_cast<const uint16_t*>(from), left / 2);
  }

  const Hessian& p_;
  Common& common_;
  char* shared_;
  int t_ = 0;
  float weight_;  // of token t_ + lane
};

}  // namespace distaya::syrk
