// One warp multiplies a tile in shared memory by the tokens of a pass. Codes become 16-bit floats
// code - zero, which are exact; the tensor cores sum exact products in fp32 over a group of
// columns; the group's scale multiplies that sum in fp32.
#pragma once

#include "sqgemm/tile.cuh"

namespace distaya::sqgemm {

enum class Body { int4, int8, sparse };  // what the fragment loop reads: 4-bit words, bytes, 2:4

// a 16-bit float whose last place is 1, so that or-ing a code into it adds the code: 128 in bf16,
// 1024 in fp16; twice in a word.
template <class T>
inline constexpr uint32_t magic = dtype_of<T> == Dtype::bf16 ? 0x43004300u : 0x64006400u;

// What is added to a code or-ed into `magic` to give code - zero.
template <class T>
__device__ inline uint32_t minus(uint32_t zero) {
  return (magic<T> | 0x80008000u) + zero * 0x00010001u;
}

// The four pairs (nibble i, nibble i + 4) of a word, plus `less` of minus().
template <class T>
__device__ inline void int4_pairs(uint32_t word, uint32_t less, uint32_t (&out)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    out[i] = ptx::add2<T>(ptx::and_or<0x000f000fu>(word >> 4 * i, magic<T>), less);
}

// Likewise of bytes, but |code - zero| <= 255, exact in bf16, needs a float in between: 2^23 +
// code.
template <class T>
__device__ inline uint32_t minus_byte(uint32_t zero) {
  return dtype_of<T> == Dtype::f16 ? minus<T>(zero) : 0xcb000000u + zero;
}

// The two pairs of neighbouring bytes of a word, plus `less` of minus_byte().
template <class T>
__device__ inline void int8_pairs(uint32_t word, uint32_t less, uint32_t (&out)[2]) {
  if constexpr (dtype_of<T> == Dtype::f16) {
    out[0] = ptx::add2<T>(__byte_perm(word, magic<T>, 0x5150), less);
    out[1] = ptx::add2<T>(__byte_perm(word, magic<T>, 0x5352), less);
  } else {
    float code[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i)
      code[i] =
          __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440u + i)) + __uint_as_float(less);
    out[0] = ptx::pack_bf16(code[0], code[1]);
    out[1] = ptx::pack_bf16(code[2], code[3]);
  }
}

// This lane's words of a line for slabs first .. first + n - 1.
template <int n>
__device__ inline void load_words(uint32_t (&out)[n], const uint8_t* body, int line, int lane,
                                  int first) {
  struct alignas(4 * n) Several {
    uint32_t value[n];
  };

  const int slot = shuffled_slot(line * 32 + lane_slot(lane));
  const Several all = *reinterpret_cast<const Several*>(body + 16 * slot + 4 * first);
#pragma unroll
  for (int i = 0; i < n; ++i) out[i] = all.value[i];
}

// Operand B of a block of columns for 8 tokens. x: [8][128] of 16 bits, chunks shuffled.
template <Body body, int columns>
struct Activations {
  uint32_t b[columns / 16][2];  // of each step

  __device__ void load(const uint8_t* x, int block, int lane) {
    const int g = lane / 4, c = lane % 4, first = columns / 8 * block;
    const uint8_t* token = x + g * pack::kTileCols * 2;
    if constexpr (body == Body::int4) {
#pragma unroll
      for (int i = 0; i < columns / 32; ++i) {
        const int chunk = shuffled_chunk(g, first + 4 * i + c);
        const uint4 v = *reinterpret_cast<const uint4*>(token + 16 * chunk);
        b[2 * i][0] = v.x, b[2 * i][1] = v.y, b[2 * i + 1][0] = v.z, b[2 * i + 1][1] = v.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < columns / 16; ++i) {
        const int chunk = shuffled_chunk(g, first + 2 * i + c / 2);
        const uint2 v = *reinterpret_cast<const uint2*>(token + 16 * chunk + c % 2 * 8);
        b[i][0] = v.x, b[i][1] = v.y;
      }
    }
  }
};

template <>
struct Activations<Body::sparse, 64> {
  uint32_t b[2][4];  // of the two steps

  // Register r holds columns 16 (c / 2) + 8 step + 2 (c % 2) + 32 (r % 2) + 4 (r / 2) + {0, 1}.
  // Lanes of the upper half read r / 2 = 1 first: so no two of the warp meet in a bank.
  __device__ void load(const uint8_t* x, int block64, int lane) {
    const int g = lane / 4, c = lane % 4;
    const uint8_t* token = x + g * pack::kTileCols * 2;
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int chunk = shuffled_chunk(g, 8 * block64 + 4 * r + c / 2 * 2 + step);
        const auto* words = reinterpret_cast<const uint32_t*>(token + 16 * chunk);
        const uint32_t here = words[c], other = words[c ^ 2];
        b[step][r] = c < 2 ? here : other;
        b[step][2 + r] = c < 2 ? other : here;
      }
  }
};

// Operand A of `slabs` slabs over a block of columns: 64, or 32 where registers are short.
template <class T, Body body, int slabs, int columns>
struct Weights {
  static constexpr int kSteps = body == Body::sparse ? 2 : columns / 16;
  static constexpr int kParts = columns / 32;
  uint32_t a[slabs][kSteps][4];
  uint32_t meta[slabs];           // sparse
  float scale[kParts][2][slabs];  // of every 32 columns; rows g, rows g + 8

  // Scales of the first 32 columns only where they have their own (groups of 32).
  __device__ void load(const uint8_t* at, const Scales& s, int block, int lane, int first) {
    const int g = lane / 4, c = lane % 4, shift = s.shift();
    if constexpr (body == Body::sparse) load_words(meta, at, meta_line(block), lane, first);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 32 * half + 4 * g + first;
      uint32_t less[slabs];
      if constexpr (body == Body::sparse) {  // all of this lane's columns lie in one group
        load_less(less, s, 64 * block + 16 * c >> shift, row);
        decode(at, less, sparse_line(block, half), 0, half, lane, first);
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int block32 = kParts * block + part, q = 32 * block32 >> shift;
        const bool own = shift == 5;
        if (part == kParts - 1 || own) load_scales(scale[part][half], s, q, row);
        if constexpr (body != Body::sparse)
          if (part == 0 || own) load_less(less, s, q, row);
        if constexpr (body == Body::int4)
          decode(at, less, int4_line(block32, half), 2 * part, half, lane, first);
        if constexpr (body == Body::int8) {
          decode(at, less, int8_line(2 * block32, half), 2 * part, half, lane, first);
          decode(at, less, int8_line(2 * block32 + 1, half), 2 * part + 1, half, lane, first);
        }
      }
    }
  }

 private:
  static __device__ uint32_t minus_of(uint32_t zero) {
    return body == Body::int8 ? minus_byte<T>(zero) : minus<T>(zero);
  }

  static __device__ void load_less(uint32_t (&less)[slabs], const Scales& s, int q, int row) {
    if (s.format.symmetric) {
      const uint32_t all = minus_of(static_cast<uint32_t>(s.format.symmetric_zero()));
#pragma unroll
      for (int i = 0; i < slabs; ++i) less[i] = all;
    } else {
      const uint32_t zeros = s.zeros<slabs>(q, row);
#pragma unroll
      for (int i = 0; i < slabs; ++i) less[i] = minus_of(zeros >> 8 * i & 0xffu);
    }
  }

  // The words of one line fill two steps (int8: one) from `step` on.
  __device__ void decode(const uint8_t* at, const uint32_t (&less)[slabs], int line, int step,
                         int half, int lane, int first) {
    uint32_t words[slabs];
    load_words(words, at, line, lane, first);
#pragma unroll
    for (int i = 0; i < slabs; ++i) {
      if constexpr (body == Body::int8) {
        uint32_t pairs[2];
        int8_pairs<T>(words[i], less[i], pairs);
        a[i][step][half] = pairs[0], a[i][step][half + 2] = pairs[1];
      } else {
        uint32_t pairs[4];
        int4_pairs<T>(words[i], less[i], pairs);
        a[i][step][half] = pairs[0], a[i][step][half + 2] = pairs[1];
        a[i][step + 1][half] = pairs[2], a[i][step + 1][half + 2] = pairs[3];
      }
    }
  }
};

// sum += scale * part, then part = 0.
__device__ inline void settle(float (&sum)[4], float (&part)[4], float low, float high) {
  sum[0] = fmaf(low, part[0], sum[0]);
  sum[1] = fmaf(low, part[1], sum[1]);
  sum[2] = fmaf(high, part[2], sum[2]);
  sum[3] = fmaf(high, part[3], sum[3]);
  part[0] = part[1] = part[2] = part[3] = 0.f;
}

// part[i] += slab i of a 2:4 block times 8 tokens; of its columns 0..31 (lower), 32..63 (upper).
template <class T, int slabs, int parts>
__device__ inline void multiply_sparse(float (&part)[slabs][4],
                                       const Weights<T, Body::sparse, slabs, 64>& w,
                                       const Activations<Body::sparse, 64> (&v)[parts], bool lower,
                                       bool upper) {
#pragma unroll
  for (int p = 0; p < parts; ++p) {
    uint32_t b[2][4];
#pragma unroll
    for (int j = 0; j < 8; ++j)
      b[j / 4][j % 4] = (j % 2 ? upper : lower) ? v[p].b[j / 4][j % 4] : 0u;
#pragma unroll
    for (int i = 0; i < slabs; ++i) {
      ptx::mma_sparse<T, 0>(part[i], w.a[i][0], b[0], w.meta[i]);
      ptx::mma_sparse<T, 1>(part[i], w.a[i][1], b[1], w.meta[i]);
    }
  }
}

// sum[slab][n] += the tile's 16 rows of the slab times tokens 8n .. 8n+7. x: [parts][n_tiles * 8]
// tokens of 128 columns each, whose parts add up.
template <class T, Body body, int n_tiles, int parts>
__device__ inline void multiply_tile(float (&sum)[4][n_tiles][4], const uint8_t* at,
                                     const Scales& s, const uint8_t* x) {
  constexpr int kGroup = 8 * pack::kTileCols * 2;  // bytes of 8 tokens
  // As the registers allow: more slabs read x less often, more columns settle less often.
  constexpr bool tight = n_tiles == 8 && body != Body::sparse;
  constexpr int slabs = n_tiles * parts <= 2 ? 4 : tight ? 1 : 2;
  constexpr int columns = tight ? 32 : 64;
  const bool fine = s.format.group == 32;
#pragma unroll 1
  for (int block = 0; block < pack::kTileCols / columns; ++block) {
    const int lane = static_cast<int>((n_tiles == 8 ? ptx::thread_anew() : threadIdx.x) % 32u);
#pragma unroll
    for (int first = 0; first < 4; first += slabs) {
      if constexpr (n_tiles == 8) __syncwarp();  // as below
      Weights<T, body, slabs, columns> w;
      w.load(at, s, block, lane, first);
#pragma unroll
      for (int n = 0; n < n_tiles; ++n) {
        if constexpr (n_tiles >= 2) __syncwarp();  // no loads ahead of here: registers are short
        float part[slabs][4] = {};
        Activations<body, columns> v[parts];
#pragma unroll
        for (int p = 0; p < parts; ++p) v[p].load(x + (p * n_tiles + n) * kGroup, block, lane);
        const auto flush = [&](int which) {
#pragma unroll
          for (int i = 0; i < slabs; ++i)
            settle(sum[first + i][n], part[i], w.scale[which][0][i], w.scale[which][1][i]);
        };
        if constexpr (body == Body::sparse) {
          if (fine) {
            multiply_sparse(part, w, v, true, false);
            flush(0);
            multiply_sparse(part, w, v, false, true);
            flush(1);
          } else {
            multiply_sparse(part, w, v, true, true);
            flush(1);
          }
        } else {
#pragma unroll
          for (int step = 0; step < w.kSteps; ++step) {
#pragma unroll
            for (int p = 0; p < parts; ++p)
#pragma unroll
              for (int i = 0; i < slabs; ++i)
                ptx::mma<T>(part[i], w.a[i][step], v[p].b[step][0], v[p].b[step][1]);
            if (step == 1 && w.kParts == 2 && fine) flush(0);
          }
          flush(w.kParts - 1);
        }
      }
    }
  }
}

}  // namespace distaya::sqgemm
