// Reading packed tiles: unpack, dequantize, gather. A thread takes 8 consecutive columns of a row.
// The 32 lanes of a warp are 8 rows x 4 quarters of 8 columns: their words are whole sectors of a
// dense body, and what they write are whole sectors of a row.
#include <type_traits>

#include "core/cuda.cuh"
#include "pack/pack.h"
#include "pack/tile.cuh"

namespace distaya::pack {
namespace {

using cuda::ceil_div;
using cuda::grid_of;

constexpr int kUnit = 8;  // columns of a thread
constexpr int kWarps = kThreads / 32;

// 4 columns from k on of a 2:4 tile, one code per byte.
__device__ uint32_t codes_24(const uint32_t* body, int r, int k, uint32_t zero) {
  const Place meta = place_24_meta(r, k), at = place_24(r, k, 0);
  const uint32_t pair = body[meta.word] >> meta.bit, w = body[at.word] >> at.bit;
  const uint32_t a = (w & 15) ^ zero, b = (w >> 16 & 15) ^ zero;
  return (zero * 0x01010101u) ^ a << 8 * (pair & 3) ^ b << 8 * (pair >> 2 & 3);
}

// 4 columns from k on of a masked tile; starts: of the codes of each chunk, or null (int4_out).
__device__ uint32_t codes_masked(const Format& f, const uint32_t* body, const int* starts, int r,
                                 int k, uint32_t zero) {
  const int chunk = chunk_of(r, k), bit = chunk_bit(r, k);
  const uint64_t mask = reinterpret_cast<const uint64_t*>(body)[chunk];
  const uint8_t* values = reinterpret_cast<const uint8_t*>(body) + kMaskBytes +
                          (starts ? starts[chunk] : chunk * f.chunk_values());
  int rank = __popcll(mask & ((uint64_t{1} << bit) - 1));
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    uint32_t code = zero;
    if (mask >> (bit + i) & 1) {
      code = values[rank / 2] >> 4 * (rank % 2) & 15u;
      ++rank;
    }
    out |= code << 8 * i;
  }
  return out;
}

// Codes of columns k .. k + 7 (k % 8 == 0) of tile row r, one per byte.
__device__ uint2 codes_at(const Format& f, const uint32_t* body, const int* starts, int r, int k,
                          uint32_t zero) {
  switch (f.kind) {
    case Kind::int4: {
      const uint32_t w = body[place_int4(r, k).word];
      uint32_t half[2] = {};
      for (int i = 0; i < kUnit; ++i)
        half[i / 4] |= (w >> place_int4(0, i).bit & 15u) << 8 * (i % 4);
      return {half[0], half[1]};
    }
    case Kind::int3: {
      const uint32_t low = body[place_int3_low(r, k).word] >> place_int3_low(0, k % 16).bit;
      const uint32_t high = body[place_int3_high(r, k).word] >> place_int3_high(0, k % 32).bit;
      return {(low & 0x03030303u) | (high & 0x01010101u) << 2,
              (low >> 2 & 0x03030303u) | (high >> 1 & 0x01010101u) << 2};
    }
    case Kind::int8: return {body[place_int8(r, k).word], body[place_int8(r, k + 4).word]};
    case Kind::int4_24: return {codes_24(body, r, k, zero), codes_24(body, r, k + 4, zero)};
    default:
      return {codes_masked(f, body, starts, r, k, zero),
              codes_masked(f, body, starts, r, k + 4, zero)};
  }
}

// Up to 8 elements to a row; whole vectors where the row allows them.
template <class T>
__device__ void put(T* to, const T (&x)[kUnit], int64_t n, bool whole) {
  if (whole && n >= kUnit) {
    using V = std::conditional_t<sizeof(T) == 1, uint2, uint4>;
    const V* from = reinterpret_cast<const V*>(x);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof x / sizeof(V)); ++i)
      reinterpret_cast<V*>(to)[i] = from[i];
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i)
      if (i < n) to[i] = x[i];
  }
}

template <class T>
__device__ void put_floats(uint2 codes, float scale, uint32_t zero, T* to, int64_t n, bool whole) {
  alignas(16) T x[kUnit];
  const float z = static_cast<float>(zero);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    const uint32_t code = (i < 4 ? codes.x : codes.y) >> 8 * (i % 4) & 255u;
    cuda::store_float(&x[i], __fmul_rn(scale, static_cast<float>(code) - z));
  }
  put(to, x, n, whole);
}

// Whether rows of `cols` elements of T can be written in whole vectors of kUnit.
template <class T>
bool whole_rows(const void* to, int64_t cols) {
  constexpr uintptr_t kVector = sizeof(T) == 1 ? 8 : 16;
  return reinterpret_cast<uintptr_t>(to) % kVector == 0 && cols % kUnit == 0;
}

// The body of a tile. int4_mask: `starts` is filled by warp 0; the block must stand together.
__device__ const uint32_t* open_tile(const Format& f, const uint8_t* data, int64_t rt, int64_t ct,
                                     int* starts) {
  const uint8_t* record = data + record_at(f, data, rt, ct);
  const auto* body = reinterpret_cast<const uint32_t*>(record + f.body_at());
  if (f.kind == Kind::int4_mask) {
    __syncthreads();  // the tile before is done with
    if (threadIdx.x < 32)
      scan_chunks(reinterpret_cast<const uint64_t*>(body), starts, static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  return body;
}

// Calls body(r, k) for the units of a tile that begin inside [rows, cols].
template <class Body>
__device__ void over_units(int64_t rows, int64_t cols, const Body& body) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int step = warp; step < kTileWeights / (32 * kUnit); step += kWarps) {
    const int r = step % 8 * 8 + lane / 4, k = step / 8 * 32 + lane % 4 * kUnit;
    if (r < rows && k < cols) body(r, k);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const Dequantize p, bool whole) {
  __shared__ int starts[kChunks];
  const Format& f = p.f;
  const int64_t wide = f.col_tiles(), tall = ceil_div<int64_t>(p.count, kTileRows);
  for (int64_t i = blockIdx.x; i < tall * wide; i += gridDim.x) {
    const int64_t rt = p.first / kTileRows + i / wide, ct = i % wide;
    const uint32_t* body = open_tile(f, p.data, rt, ct, starts);
    const Grid grid = grid_at(f, p.data, rt, ct);
    const int64_t top = rt * kTileRows - p.first, left = ct * kTileCols;
    const int* at = f.kind == Kind::int4_mask ? starts : nullptr;
    over_units(p.count - top, f.cols - left, [&](int r, int k) {
      const int number = k / width_of(f) * kTileRows + r;
      const uint32_t zero = zero_at(f, grid.zeros, number);
      put_floats(codes_at(f, body, at, r, k, zero), scale_at(f, grid.scales, number), zero,
                 static_cast<T*>(p.W) + (top + r) * f.cols + left + k, f.cols - left - k, whole);
    });
  }
}

template <class Bits>
__device__ void take_out(const Unpack& p, int64_t rt, int64_t ct, const Grid& grid) {
  const Format& f = p.f;
  for (int i = threadIdx.x; i < groups_of(f) * kTileRows; i += kThreads) {
    const int64_t row = rt * kTileRows + i % kTileRows;
    const int64_t group = (f.group ? ct * groups_of(f) : 0) + i / kTileRows;
    if (row >= f.rows || group >= f.groups()) continue;
    const int64_t to = row * f.groups() + group;
    static_cast<Bits*>(p.scales)[to] = reinterpret_cast<const Bits*>(grid.scales)[i];
    if (p.zeros) p.zeros[to] = grid.zeros[i];
  }
}

__global__ void __launch_bounds__(kThreads) unpack_kernel(const Unpack p, bool whole) {
  __shared__ int starts[kChunks];
  const Format& f = p.f;
  const int64_t wide = f.col_tiles() > 0 ? f.col_tiles() : 1;
  for (int64_t i = blockIdx.x; i < f.row_tiles() * wide; i += gridDim.x) {
    const int64_t rt = i / wide, ct = i % wide;
    if (f.group ? ct < f.col_tiles() : ct == 0) {
      const Grid grid = grid_at(f, p.data, rt, ct);
      f.scale == Dtype::f32 ? take_out<uint32_t>(p, rt, ct, grid)
                            : take_out<uint16_t>(p, rt, ct, grid);
    }
    if (ct >= f.col_tiles()) continue;
    const uint32_t* body = open_tile(f, p.data, rt, ct, starts);
    const Grid grid = grid_at(f, p.data, rt, ct);
    const int64_t top = rt * kTileRows, left = ct * kTileCols;
    const int* at = f.kind == Kind::int4_mask ? starts : nullptr;
    over_units(f.rows - top, f.cols - left, [&](int r, int k) {
      const uint32_t zero = zero_at(f, grid.zeros, k / width_of(f) * kTileRows + r);
      const uint2 codes = codes_at(f, body, at, r, k, zero);
      alignas(8) uint8_t x[kUnit];
#pragma unroll
      for (int j = 0; j < kUnit; ++j)
        x[j] = static_cast<uint8_t>((j < 4 ? codes.x : codes.y) >> 8 * (j % 4));
      put(p.codes + (top + r) * f.cols + left + k, x, f.cols - left - k, whole);
    });
  }
}

// One warp per tile of a wanted row; its first 16 lanes hold the 128 columns.
template <class T>
__global__ void __launch_bounds__(kThreads) gather_kernel(const Gather p, bool whole) {
  __shared__ int starts[kWarps][kChunks];
  const Format& f = p.f;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int64_t i = blockIdx.x; i < p.count; i += gridDim.x) {
    const int64_t row = p.indices[i];
    const bool known = row >= 0 && row < f.rows;
    const int64_t rt = known ? row / kTileRows : 0;
    const int r = known ? static_cast<int>(row % kTileRows) : 0;
    for (int64_t ct = blockIdx.y * kWarps + warp; ct < f.col_tiles();
         ct += static_cast<int64_t>(gridDim.y) * kWarps) {
      const int k = lane * kUnit;
      const int64_t left = f.cols - ct * kTileCols - k;
      T* to = static_cast<T*>(p.W) + i * f.cols + ct * kTileCols + k;
      if (!known) {  // such a row may have no tile at all
        if (k < kTileCols && left > 0)
          put_floats(uint2{1u, 1u}, __int_as_float(0x7fffffff), 0, to, left, whole);
        continue;
      }
      const uint8_t* record = p.data + record_at(f, p.data, rt, ct);
      const auto* body = reinterpret_cast<const uint32_t*>(record + f.body_at());
      const bool mask = f.kind == Kind::int4_mask;
      __syncwarp();
      if (mask) scan_chunks(reinterpret_cast<const uint64_t*>(body), starts[warp], lane);
      __syncwarp();
      if (k >= kTileCols || left <= 0) continue;
      const Grid grid = grid_at(f, p.data, rt, ct);
      const int number = k / width_of(f) * kTileRows + r;
      const uint32_t zero = zero_at(f, grid.zeros, number);
      const uint2 codes = codes_at(f, body, mask ? starts[warp] : nullptr, r, k, zero);
      put_floats(codes, scale_at(f, grid.scales, number), zero, to, left, whole);
    }
  }
}

}  // namespace

void unpack_cuda(const Unpack& p, int device, Stream stream) {
  const cuda::DeviceGuard guard(device);
  const int64_t wide = p.f.col_tiles() > 0 ? p.f.col_tiles() : 1;
  unpack_kernel<<<grid_of(p.f.row_tiles() * wide), kThreads, 0, cuda::raw(stream)>>>(
      p, whole_rows<uint8_t>(p.codes, p.f.cols));
  cuda::check_launch();
}

void dequantize_cuda(const Dequantize& p, int device, Stream stream) {
  const cuda::DeviceGuard guard(device);
  const int64_t tiles = ceil_div<int64_t>(p.count, kTileRows) * p.f.col_tiles();
  dispatch<float, bf16, f16>(p.dtype, "W", [&]<class T>() {
    dequantize_kernel<T>
        <<<grid_of(tiles), kThreads, 0, cuda::raw(stream)>>>(p, whole_rows<T>(p.W, p.f.cols));
  });
  cuda::check_launch();
}

void gather_cuda(const Gather& p, int device, Stream stream) {
  const cuda::DeviceGuard guard(device);
  const dim3 grid(grid_of(p.count), grid_of(ceil_div<int64_t>(p.f.col_tiles(), kWarps), 65535));
  dispatch<float, bf16, f16>(p.dtype, "W", [&]<class T>() {
    gather_kernel<T><<<grid, kThreads, 0, cuda::raw(stream)>>>(p, whole_rows<T>(p.W, p.f.cols));
  });
  cuda::check_launch();
}

}  // namespace distaya::pack
