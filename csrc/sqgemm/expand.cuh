// One warp turns a staged record of kind int3, int4_mask or int4_out into the words of kind int4,
// so that one multiplication serves all kinds of at most 4 bits. Pruned weights become zero codes.
#pragma once

#include "sqgemm/tile.cuh"

namespace distaya::sqgemm {

// A word of kind int4 from its codes, a byte each: `low` columns 0..3, `high` columns 4..7.
__device__ inline uint32_t int4_word(uint32_t low, uint32_t high) {
  low |= low >> 12;  // bytes 0 and 1 now hold columns 0, 2 and 1, 3
  high |= high >> 12;
  return __byte_perm(low, high, 0x5140);
}

// Where that word goes: 8 columns of `row`.
__device__ inline uint32_t* word_at(uint8_t* out, int eighth, int row) {
  const int word = pack::word_of(eighth / 4, eighth % 4, row);
  return reinterpret_cast<uint32_t*>(out) + 4 * shuffled_slot(word / 4) + word % 4;
}

__device__ inline void expand_int3(const uint8_t* body, uint8_t* out) {
  const auto* words = reinterpret_cast<const uint32_t*>(body);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 16; ++i) {  // 16 columns of one row
    const int row = i % 2 * 32 + lane, column = i / 2 * 16;
    const uint32_t two = words[pack::place_int3_low(row, column).word];
    const uint32_t one = words[pack::place_int3_high(row, column).word] >> column % 32 / 4;
    uint32_t codes[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      codes[j] = (two >> 2 * j & 0x03030303u) | (one >> j & 0x01010101u) << 2;
    *word_at(out, column / 8, row) = int4_word(codes[0], codes[1]);
    *word_at(out, column / 8 + 1, row) = int4_word(codes[2], codes[3]);
  }
}

// __byte_perm's selector that spreads the first bytes of a word over the set bits of `mask`, and
// byte 4 over the others.
__device__ inline uint32_t spread_selector(int mask) {
  uint32_t selector = 0;
  int taken = 0;
  for (int i = 0; i < 4; ++i)
    selector |= static_cast<uint32_t>(mask >> i & 1 ? taken++ : 4) << 4 * i;
  return selector;
}

// The kept codes of a chunk, in order. Reads no word that holds none of them.
class Codes {
 public:
  __device__ Codes(const uint8_t* values, int byte, bool any)
      : next_(reinterpret_cast<const uint32_t*>(values) + byte / 4), window_(0), bits_(0) {
    if (!any) return;
    window_ = *next_++ >> 8 * (byte % 4);
    bits_ = 32 - 8 * (byte % 4);
  }

  // Four columns of one row, a byte each.
  __device__ uint32_t take(int mask, uint32_t zero, const uint32_t* selectors) {
    const int bits = 4 * __popc(mask);
    if (bits_ < bits) {
      window_ |= static_cast<uint64_t>(*next_++) << bits_;
      bits_ += 32;
    }
    uint32_t codes = static_cast<uint32_t>(window_) & 0xffffu;
    window_ >>= bits;
    bits_ -= bits;
    codes = (codes | codes << 8) & 0x00ff00ffu;
    codes = (codes | codes << 4) & 0x0f0f0f0fu;
    return __byte_perm(codes, zero, selectors[mask]);
  }

 private:
  const uint32_t* next_;
  uint64_t window_;
  int bits_;
};

// Sum of `n` over the lanes before this one, and over all.
__device__ inline int sum_before(int n, int& all) {
  const int lane = threadIdx.x % 32;
  int sum = n;
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(cuda::kFullWarp, sum, d);
    if (lane >= d) sum += other;
  }
  all = __shfl_sync(cuda::kFullWarp, sum, 31);
  return sum - n;
}

// A lane takes two neighbouring chunks at a time: 16 rows x 8 columns, whole words of int4.
__device__ inline void expand_mask(const pack::Format& f, const Scales& s, const uint8_t* body,
                                   const uint32_t* selectors, uint8_t* out) {
  const auto* masks = reinterpret_cast<const uint64_t*>(body);
  const uint8_t* values = body + pack::kMaskBytes;
  const int lane = threadIdx.x % 32;
  int before = 0;
#pragma unroll 1
  for (int pair = lane; pair < pack::kChunks / 2; pair += 32) {
    uint64_t low = masks[2 * pair], high = masks[2 * pair + 1];
    const int low_bytes = (__popcll(low) + 1) / 2, high_bytes = (__popcll(high) + 1) / 2;
    int first = 0, second = 0;  // where their codes begin
    if (f.kind == Kind::int4_mask) {
      int all = 0;
      first = before + sum_before(low_bytes + high_bytes, all);
      second = first + low_bytes;
      before += all;
    } else {
      first = 2 * pair * f.chunk_values();
      second = first + f.chunk_values();
    }
    Codes left(values, first, low != 0), right(values, second, high != 0);
    const int eighth = pair / 8 * 2 + pair % 2, row = pair / 2 % 4 * 16;
    const int q = 8 * eighth >> s.shift();
#pragma unroll 2
    for (int i = 0; i < 16; ++i) {
      const uint32_t zero = s.zeros<1>(q, row + i);
      const uint32_t a = left.take(static_cast<int>(low & 15), zero, selectors);
      const uint32_t b = right.take(static_cast<int>(high & 15), zero, selectors);
      *word_at(out, eighth, row + i) = int4_word(a, b);
      low >>= 4;
      high >>= 4;
    }
  }
}

}  // namespace distaya::sqgemm
