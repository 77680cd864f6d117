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
using cuda::launch;

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
__device__ uint32_t codes_masked(const Sizes& z, const uint32_t* body, const int* starts, int r,
                                 int k, uint32_t zero) {
  const int chunk = chunk_of(r, k), bit = chunk_bit(r, k);
  const uint64_t mask = reinterpret_cast<const uint64_t*>(body)[chunk];
  const uint8_t* values = reinterpret_cast<const uint8_t*>(body) + kMaskBytes +
                          (starts ? starts[chunk] : chunk * z.chunk_values);
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
__device__ uint2 codes_at(const Format& f, const Sizes& z, const uint32_t* body, const int* starts,
                          int r, int k, uint32_t zero) {
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
      return {codes_masked(z, body, starts, r, k, zero),
              codes_masked(z, body, starts, r, k + 4, zero)};
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

__device__ const uint8_t* record_of(const Format& f, const Sizes& z, const uint8_t* data,
                                    int64_t rt, int64_t ct) {
  const int64_t tile = rt * z.wide + ct;
  if (f.kind == Kind::int4_mask) return data + reinterpret_cast<const uint64_t*>(data)[tile];
  return data + tile * z.record;
}

__device__ Grid grid_at(const Format& f, const Sizes& z, const uint8_t* data, int64_t rt,
                        int64_t ct) {
  if (!f.group) return row_grid_at(f, z, record_of(f, z, data, z.tall, 0), rt);
  const uint8_t* record = record_of(f, z, data, rt, ct);
  return {record, record + z.zeros_at};
}

// The body of a tile. int4_mask: `starts` is filled by warp 0; the block must stand together.
__device__ const uint32_t* open_tile(const Format& f, const Sizes& z, const uint8_t* data,
                                     int64_t rt, int64_t ct, int* starts) {
  const uint8_t* record = record_of(f, z, data, rt, ct);
  const auto* body = reinterpret_cast<const uint32_t*>(record + z.body_at);
  if (f.kind == Kind::int4_mask) {
    __syncthreads();  // the tile before is done with
    if (threadIdx.x < 32)
      scan_chunks(reinterpret_cast<const uint64_t*>(body), starts, static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  return body;
}

// Calls body(r, k) for the units of a tile that begin inside [rows, cols].
template <int kAtOnce, class Body>
__device__ void over_units(int64_t rows, int64_t cols, const Body& body) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll kAtOnce
  for (int step = warp; step < kTileWeights / (32 * kUnit); step += kWarps) {
    const int r = step % 8 * 8 + lane / 4, k = step / 8 * 32 + lane % 4 * kUnit;
    if (r < rows && k < cols) body(r, k);
  }
}

template <class T, Kind kKind>
__global__ void __launch_bounds__(kThreads, 2)
    dequantize_kernel(const Dequantize any, const Sizes z, bool whole) {
  __shared__ int starts[kChunks];
  const Dequantize p = of_kind<kKind>(any);
  const Format& f = p.f;
  const int64_t ct = blockIdx.x, left = ct * kTileCols;
  for (int64_t top = blockIdx.y * kTileRows; top < p.count;
       top += static_cast<int64_t>(gridDim.y) * kTileRows) {
    const int64_t rt = (p.first + top) / kTileRows;
    const uint32_t* body = open_tile(f, z, p.data, rt, ct, starts);
    const Grid grid = grid_at(f, z, p.data, rt, ct);
    const int* at = kKind == Kind::int4_mask ? starts : nullptr;
    constexpr int kAtOnce = kKind == Kind::int4_mask || kKind == Kind::int4_out ? 1 : 2;
    over_units<kAtOnce>(p.count - top, f.cols - left, [&](int r, int k) {
      const int number = (k >> z.shift) * kTileRows + r;
      const uint32_t zero = zero_at(f, grid.zeros, number);
      put_floats(codes_at(f, z, body, at, r, k, zero), scale_at(f, grid.scales, number), zero,
                 static_cast<T*>(p.W) + (top + r) * f.cols + left + k, f.cols - left - k, whole);
    });
  }
}

template <class Bits>
__device__ void take_out(const Unpack& p, const Sizes& z, int64_t rt, int64_t ct,
                         const Grid& grid) {
  const int64_t first = p.f.group ? ct * z.tile_groups : 0;
  for (int i = threadIdx.x; i < z.tile_groups * kTileRows; i += kThreads) {
    const int64_t row = rt * kTileRows + i % kTileRows, group = first + i / kTileRows;
    if (row >= p.f.rows || group >= z.groups) continue;
    const int64_t to = row * z.groups + group;
    static_cast<Bits*>(p.scales)[to] = reinterpret_cast<const Bits*>(grid.scales)[i];
    if (p.zeros) p.zeros[to] = grid.zeros[i];
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    unpack_kernel(const Unpack p, const Sizes z, bool whole) {
  __shared__ int starts[kChunks];
  const Format& f = p.f;
  const int64_t ct = blockIdx.x, left = ct * kTileCols;
  for (int64_t rt = blockIdx.y; rt < z.tall; rt += gridDim.y) {
    if (f.group && ct >= z.wide) return;  // a matrix without columns
    const Grid grid = grid_at(f, z, p.data, rt, ct);
    if (f.group || ct == 0)
      f.scale == Dtype::f32 ? take_out<uint32_t>(p, z, rt, ct, grid)
                            : take_out<uint16_t>(p, z, rt, ct, grid);
    if (ct >= z.wide) continue;
    const uint32_t* body = open_tile(f, z, p.data, rt, ct, starts);
    const int64_t top = rt * kTileRows;
    const int* at = f.kind == Kind::int4_mask ? starts : nullptr;
    over_units<1>(f.rows - top, f.cols - left, [&](int r, int k) {
      const uint32_t zero = zero_at(f, grid.zeros, (k >> z.shift) * kTileRows + r);
      const uint2 codes = codes_at(f, z, body, at, r, k, zero);
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
__global__ void __launch_bounds__(kThreads, 2)
    gather_kernel(const Gather p, const Sizes z, bool whole) {
  __shared__ int starts[kWarps][kChunks];
  const Format& f = p.f;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, k = lane * kUnit;
  const bool mask = f.kind == Kind::int4_mask;
  for (int64_t i = blockIdx.x; i < p.count; i += gridDim.x) {
    const int64_t row = p.indices[i], rt = row / kTileRows;
    const bool known = row >= 0 && row < f.rows;  // if not, there may be no tile at all
    const int r = static_cast<int>(row % kTileRows);
    for (int64_t ct = blockIdx.y * kWarps + warp; ct < z.wide;
         ct += static_cast<int64_t>(gridDim.y) * kWarps) {
      const uint8_t* record = known ? record_of(f, z, p.data, rt, ct) : nullptr;
      const auto* body = reinterpret_cast<const uint32_t*>(record + z.body_at);
      __syncwarp();
      if (known && mask) scan_chunks(reinterpret_cast<const uint64_t*>(body), starts[warp], lane);
      __syncwarp();
      const int64_t left = f.cols - ct * kTileCols - k;
      if (k >= kTileCols || left <= 0) continue;
      uint2 codes = {1, 1};
      float scale = __int_as_float(0x7fffffff);  // NaN
      uint32_t zero = 0;
      if (known) {
        const Grid grid = grid_at(f, z, p.data, rt, ct);
        const int number = (k >> z.shift) * kTileRows + r;
        zero = zero_at(f, grid.zeros, number);
        codes = codes_at(f, z, body, mask ? starts[warp] : nullptr, r, k, zero);
        scale = scale_at(f, grid.scales, number);
      }
      T* to = static_cast<T*>(p.W) + i * f.cols + ct * kTileCols + k;
      put_floats(codes, scale, zero, to, left, whole);
    }
  }
}

template <class T>
void launch_dequantize(const Dequantize& p, cudaStream_t stream) {
  const Sizes z(p.f);
  const dim3 grid = grid_of_tiles(ceil_div<int64_t>(p.count, kTileRows), z.wide);
  const bool whole = whole_rows<T>(p.W, p.f.cols);
  over_kind(p.f.kind, [&]<Kind kKind>() {
    launch(dequantize_kernel<T, kKind>, grid, kThreads, 0, stream, p, z, whole);
  });
}

}  // namespace

void unpack_cuda(const Unpack& p, int device, Stream stream) {
  const cuda::DeviceGuard guard(device);
  const Sizes z(p.f);
  launch(unpack_kernel, grid_of_tiles(z.tall, z.wide), kThreads, 0, cuda::raw(stream), p, z,
         whole_rows<uint8_t>(p.codes, p.f.cols));
}

void dequantize_cuda(const Dequantize& p, int device, Stream stream) {
  const cuda::DeviceGuard guard(device);
  dispatch<float, bf16, f16>(p.dtype, "W",
                             [&]<class T>() { launch_dequantize<T>(p, cuda::raw(stream)); });
}

void gather_cuda(const Gather& p, int device, Stream stream) {
  const cuda::DeviceGuard guard(device);
  const Sizes z(p.f);
  const dim3 grid(grid_of(p.count), grid_of(ceil_div<int64_t>(z.wide, kWarps), 65535));
  dispatch<float, bf16, f16>(p.dtype, "W", [&]<class T>() {
    launch(gather_kernel<T>, grid, kThreads, 0, cuda::raw(stream), p, z,
           whole_rows<T>(p.W, p.f.cols));
  });
}

}  // namespace distaya::pack
