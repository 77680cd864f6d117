// How the tensor-core SYRK (syrk.cuh) brings X and the weights to a block.
#pragma once

#include "core/ptx.cuh"
#include "hessian/hessian.h"
#include "hessian/syrk_tile.h"

namespace distaya::syrk {

constexpr int kSlice = kCudaRun;  // tokens in one stage of shared memory
constexpr int kStages = 4;
constexpr int kThreads = 256;
constexpr int kChunk = 8;         // elements in 16 bytes
constexpr int kRow = 2 * kPanel;  // bytes of a token in a panel
constexpr int kPanelBytes = kSlice * kRow;
constexpr int kStageBytes = 3 * kPanelBytes;
constexpr int kSharedBytes = kStages * kStageBytes;  // 96 KB; sm_86, 89 and 120 have 99 for a block
static_assert(kSlice == 32, "lane l holds the weight of token l of a slice");

// What all threads of a block know, beside the slices.
struct Common {
  Tile tile;
  int beyond[3];  // columns from the first panel to each; more than X has if there is none
  float weights[kStages][kSlice];  // of the slices in the stages; 0 beyond the last token
};

__device__ inline void prepare(Common& common, const Hessian& p) {
  const Tile tile = tile_of(blockIdx.x, static_cast<int>(cuda::ceil_div<int64_t>(p.C, kPanel)));
  for (int k = 0; k < 3; ++k)
    common.beyond[k] = tile.panel[k] < 0 ? 1 << 30 : (tile.panel[k] - tile.panel[0]) * kPanel;
  common.tile = tile;
}

// Of the lane's token of a slice.
__device__ inline float weight_at(const Hessian& p, int slice) {
  const int t = slice * kSlice + static_cast<int>(threadIdx.x) % 32;
  return t >= static_cast<int>(p.T) ? 0.f : p.weights ? p.weights[t] : 1.f;
}

// The first n (any number) of 8 elements from x on, then zeros; x lies on any element.
template <class T>
__device__ inline uint4 gather(const T* x, int64_t n) {
  const auto* half = reinterpret_cast<const uint16_t*>(x);
  if (n >= kChunk && reinterpret_cast<uintptr_t>(x) % 4 == 0) {
    const auto* word = reinterpret_cast<const uint32_t*>(x);
    return {word[0], word[1], word[2], word[3]};
  }
  if (n >= kChunk) {
    const auto* word = reinterpret_cast<const uint32_t*>(half + 1);
    const uint32_t first = half[0], a = word[0], b = word[1], c = word[2], last = half[7];
    return {first | a << 16, a >> 16 | b << 16, b >> 16 | c << 16, c >> 16 | last << 16};
  }
  uint32_t v[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) v[i] = i < n ? half[i] : 0;
  return {v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16};
}

// Brings slices of X to shared memory. A stage holds up to 3 panels [32 tokens][128 channels];
// chunk c of 16 bytes of a token lies at c ^ token % 8, so that ldmatrix, which reads one chunk of
// 8 tokens at a time, meets every bank once. Tokens of weight 0 are not read: zeros lie there, as
// beyond the last token and the last channel. aligned: every row of X begins at a multiple of 16
// bytes; if not, the copies are ordinary ones, through registers.
template <class T, bool aligned>
class Loader {
 public:
  __device__ Loader(const Hessian& p, Common& common, char* shared)
      : p_(p), common_(common), weight_(weight_at(p, 0)) {
    const int token = static_cast<int>(threadIdx.x) / 16, chunk = threadIdx.x % 16;
    from_ = static_cast<const T*>(p.X) + token * p.C + first_column();
    to_ = shared + token * kRow + 16 * (chunk ^ token % 8);
  }

  // To be called for one slice after the other, also beyond the last.
  __device__ void load(int slice) {
    if (slice * kSlice < static_cast<int>(p_.T)) {
      const int stage = slice % kStages;
      if (threadIdx.x < kSlice) common_.weights[stage][threadIdx.x] = weight_;
#pragma unroll(aligned ? 2 : 1)
      for (int i = 0; i < 2; ++i) {
        const int token = static_cast<int>(threadIdx.x) / 16 + 16 * i;
        const bool counts = __shfl_sync(cuda::kFullWarp, weight_, token) != 0;
        char* to = to_ + stage * kStageBytes + 16 * i * kRow;
        const int left = counts ? static_cast<int>(p_.C) - first_column() : 0;
#pragma unroll
        for (int k = 0; k < 3; ++k)
          copy(to + k * kPanelBytes, from_ + common_.beyond[k], left - common_.beyond[k]);
        from_ += 16 * p_.C;
      }
      weight_ = weight_at(p_, slice + 1);  // a slice before it is needed
    }
    ptx::copy_commit();
  }

 private:
  __device__ int first_column() const {
    return common_.tile.panel[0] * kPanel + static_cast<int>(threadIdx.x) % 16 * kChunk;
  }

  // A chunk, of which `left` elements exist, if any.
  __device__ static void copy(char* to, const T* from, int left) {
    if constexpr (aligned)
      ptx::copy_async_or_zero(to, from, left > 0);
    else
      *reinterpret_cast<uint4*>(to) = gather(from, left);
  }

  const Hessian& p_;
  Common& common_;
  float weight_;   // of the next slice's token `lane`
  const T* from_;  // this thread's chunk of a token of the next slice, in the first panel
  char* to_;
};

// What the weights of a slice mean for its products; the same in every lane and warp.
struct Weights {
  float one;    // of all tokens that count, unless they differ
  bool any;     // does a token count?
  bool differ;  // NaN differs from itself

  __device__ explicit Weights(const float (&weights)[kSlice]) {
    const float own = weights[threadIdx.x % 32];
    const unsigned counts = __ballot_sync(cuda::kFullWarp, own != 0);
    any = counts != 0;
    one = __shfl_sync(cuda::kFullWarp, own, any ? __ffs(static_cast<int>(counts)) - 1 : 0);
    differ = __any_sync(cuda::kFullWarp, own != 0 && own != one);
  }
};

}  // namespace distaya::syrk
