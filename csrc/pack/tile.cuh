// What the CUDA kernels of this room share: a tile's groups, the chunks of a mask, reports.
#pragma once

#include "core/cuda.cuh"
#include "pack/pack.h"

namespace distaya::pack {

inline constexpr int kThreads = 256;

// What a Format says, worked out by the host: 64-bit divisions are slow on the device.
struct Sizes {
  int shift;        // log2 of the columns of a tile that share a grid
  int tile_groups;  // their groups, 1 when they are as wide as the tile or wider
  int zeros_at, body_at, chunk_values;
  int64_t tall, wide;        // tiles
  int64_t groups, record;    // scales of a row; bytes of a record of fixed size
  int64_t offsets, section;  // bytes of int4_mask's offsets and of the row section

  explicit Sizes(const Format& f)
      : shift(f.group == 32   ? 5
              : f.group == 64 ? 6
                              : 7),
        tile_groups(kTileCols >> shift),
        zeros_at(f.zeros_at()),
        body_at(f.body_at()),
        chunk_values(f.kind == Kind::int4_out ? f.chunk_values() : 0),
        tall(f.row_tiles()),
        wide(f.col_tiles()),
        groups(f.groups()),
        record(f.kind == Kind::int4_mask ? 0 : f.record_bytes()),
        offsets(f.offsets_bytes()),
        section(f.row_section_bytes()) {}

  __device__ int64_t mask_record(int values) const {
    return (body_at + kMaskBytes + values + 15) / 16 * 16;
  }
};

// A block per tile, column tiles along x; rows of tiles beyond the limit of y are strided over.
inline dim3 grid_of_tiles(int64_t tall, int64_t wide) {
  return dim3(cuda::grid_of(wide), cuda::grid_of(tall, 65535));
}

// Calls body<kind>() so that a kernel is compiled once for each kind, and is small.
template <class Body>
void over_kind(Kind kind, const Body& body) {
  switch (kind) {
    case Kind::int4: return body.template operator()<Kind::int4>();
    case Kind::int3: return body.template operator()<Kind::int3>();
    case Kind::int8: return body.template operator()<Kind::int8>();
    case Kind::int4_24: return body.template operator()<Kind::int4_24>();
    case Kind::int4_mask: return body.template operator()<Kind::int4_mask>();
    default: return body.template operator()<Kind::int4_out>();
  }
}

// The problem with its kind as a constant.
template <Kind kKind, class P>
__device__ inline P of_kind(P p) {
  p.f.kind = kKind;
  return p;
}

// *bad starts as -1, the largest unsigned; the minimum does not depend on who comes first.
__device__ inline void report(int64_t* bad, int64_t index) {
  atomicMin(reinterpret_cast<unsigned long long*>(bad), static_cast<unsigned long long>(index));
}

__device__ inline int bytes_of(uint64_t mask) { return (__popcll(mask) + 1) / 2; }

// One warp: where the codes of each chunk begin, in bytes after the mask. Returns their sum.
__device__ inline int scan_chunks(const uint64_t* masks, int* starts, int lane) {
  int sizes[4], sum = 0;
  for (int i = 0; i < 4; ++i) sum += sizes[i] = bytes_of(masks[4 * lane + i]);
  int upto = sum;
  for (int d = 1; d < 32; d *= 2) {
    const int below = __shfl_up_sync(cuda::kFullWarp, upto, d);
    if (lane >= d) upto += below;
  }
  int at = upto - sum;
  for (int i = 0; i < 4; ++i) {
    starts[4 * lane + i] = at;
    at += sizes[i];
  }
  return __shfl_sync(cuda::kFullWarp, upto, 31);
}

// Where the scales and zeros of a tile lie: in its record, or in the row section.
struct Grid {
  const uint8_t* scales;
  const uint8_t* zeros;
};

__device__ inline Grid row_grid_at(const Format& f, const Sizes& z, const uint8_t* section,
                                   int64_t rt) {
  const uint8_t* zeros = section + z.tall * kTileRows * f.scale_bytes();
  return {section + rt * kTileRows * f.scale_bytes(), zeros + rt * kTileRows};
}

__device__ inline float scale_at(const Format& f, const uint8_t* scales, int i) {
  switch (f.scale) {
    case Dtype::f32: return reinterpret_cast<const float*>(scales)[i];
    case Dtype::bf16: return cuda::load_float(reinterpret_cast<const bf16*>(scales) + i);
    default: return cuda::load_float(reinterpret_cast<const f16*>(scales) + i);
  }
}

__device__ inline uint32_t zero_at(const Format& f, const uint8_t* zeros, int i) {
  return f.symmetric ? static_cast<uint32_t>(f.symmetric_zero()) : zeros[i];
}

}  // namespace distaya::pack
