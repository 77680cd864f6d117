// A packed tile in shared memory: how it gets there, its scales and zeros.
#pragma once

#include "core/ptx.cuh"
#include "sqgemm/fragments.h"

namespace distaya::sqgemm {

// Scales and zeros of a tile: number q * 64 + row, q = column >> shift().
struct Scales {
  const uint8_t* at;
  const pack::Format& format;

  // 32 -> 5, 64 -> 6, 128 -> 7; one scale for a row: 7, so that q is 0 for all columns of a tile.
  __device__ int shift() const { return format.group == 32 ? 5 : format.group == 64 ? 6 : 7; }

  // Zeros of rows row .. row + n - 1 in group q, a byte each.
  template <int n>
  __device__ uint32_t zeros(int q, int row) const {
    if (format.symmetric) return static_cast<uint32_t>(format.symmetric_zero()) * 0x01010101u;
    const int groups = format.group ? format.tile_groups() : 1;
    const uint8_t* from =
        at + groups * pack::kTileRows * format.scale_bytes() + q * pack::kTileRows + row;
    if constexpr (n == 4) return *reinterpret_cast<const uint32_t*>(from);
    if constexpr (n == 2) return *reinterpret_cast<const uint16_t*>(from);
    return *from;
  }
};

template <class S, int n>
__device__ inline void read_scales(float (&out)[n], const uint8_t* from, int index) {
  struct alignas(sizeof(S) * n) Several {
    S value[n];
  };

  const Several all = *reinterpret_cast<const Several*>(from + index * sizeof(S));
#pragma unroll
  for (int i = 0; i < n; ++i) out[i] = cuda::load_float(&all.value[i]);
}

// Scales of rows row .. row + n - 1 in group q.
template <int n>
__device__ inline void load_scales(float (&out)[n], const Scales& s, int q, int row) {
  const int index = q * pack::kTileRows + row;
  if (s.format.scale == Dtype::bf16)
    read_scales<bf16>(out, s.at, index);
  else if (s.format.scale == Dtype::f16)
    read_scales<f16>(out, s.at, index);
  else
    read_scales<float>(out, s.at, index);
}

// `threads` (32 or 64) neighbouring threads start copying a record: `head` chunks of 16 bytes, then
// `body` chunks to body_at on, shuffled where lanes will read them in lines. `thread`: which one.
template <int threads>
__device__ inline void copy_record(const uint8_t* from, int head, int body, bool lines, int body_at,
                                   uint8_t* to, int thread) {
  const uint64_t policy = ptx::evict_first();
  for (int i = thread; i < head; i += threads) ptx::copy_async(to + 16 * i, from + 16 * i, policy);
  from += 16 * (head + thread);
  to += body_at;
  const int place = lines ? shuffled_slot(thread) : thread, turn = lines ? 1 : 0;
#pragma unroll 2
  for (int first = 0; first + thread < body; first += threads, from += 16 * threads)
    ptx::copy_async(to + 16 * (first + (place ^ (first / 64 & turn))), from, policy);
}

// One warp copies the scales and zeros of a row tile whose rows have one scale each.
__device__ inline void copy_row_scales(const pack::Format& f, const uint8_t* buffer,
                                       int64_t row_tile, uint8_t* to) {
  const int bytes = pack::kTileRows * f.scale_bytes();
  const uint8_t* section = buffer + row_section_at(f, buffer);
  const uint8_t* scales = section + row_tile * bytes;
  const uint8_t* zeros = section + f.row_tiles() * bytes + row_tile * pack::kTileRows;
  const auto copy = [&](const uint8_t* from, uint8_t* into, int words) {
    for (int i = threadIdx.x % 32; i < words; i += 32)
      reinterpret_cast<uint32_t*>(into)[i] = reinterpret_cast<const uint32_t*>(from)[i];
  };
  copy(scales, to, bytes / 4);
  if (!f.symmetric) copy(zeros, to + bytes, pack::kTileRows / 4);
}

}  // namespace distaya::sqgemm
