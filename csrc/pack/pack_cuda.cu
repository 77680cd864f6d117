// Packing: one block per tile stages the plain codes in shared memory and writes the words of the
// body from there, each word by one thread.
#include "core/cuda.cuh"
#include "pack/pack.h"
#include "pack/tile.cuh"

namespace distaya::pack {
namespace {

// Rows are 4 bytes longer than they need be, so that threads of neighbouring rows meet no bank
// twice.
struct Stage {
  alignas(8) uint8_t codes[kTileRows][kTileCols + 4];
  uint8_t zero[4][kTileRows];
  uint64_t mask[kChunks];
  int starts[kChunks];
  int values;  // bytes of kept codes
};

// Calls body(q, r, index): group q of the tile, row r, index into [rows, groups] or -1 for padding.
template <class Body>
__device__ void over_grid(const Format& f, const Sizes& z, int64_t rt, int64_t ct,
                          const Body& body) {
  const int64_t first = f.group ? ct * z.tile_groups : 0;
  for (int i = threadIdx.x; i < z.tile_groups * kTileRows; i += kThreads) {
    const int q = i / kTileRows, r = i % kTileRows;
    const int64_t row = rt * kTileRows + r, group = first + q;
    body(q, r, row < f.rows && group < z.groups ? row * z.groups + group : -1);
  }
}

__device__ void stage_tile(const Format& f, const Sizes& z, const uint8_t* codes,
                           const uint8_t* zeros, int64_t rt, int64_t ct, int64_t* bad_code,
                           Stage& s) {
  over_grid(f, z, rt, ct, [&](int q, int r, int64_t i) {
    s.zero[q][r] = zeros && i >= 0 ? zeros[i] : static_cast<uint8_t>(f.symmetric_zero());
  });
  __syncthreads();
#pragma unroll 4
  for (int i = threadIdx.x; i < kTileWeights; i += kThreads) {
    const int r = i / kTileCols, k = i % kTileCols;
    const int64_t row = rt * kTileRows + r, col = ct * kTileCols + k;
    uint8_t code = s.zero[k >> z.shift][r];
    if (row < f.rows && col < f.cols) {
      code = codes[row * f.cols + col];
      if (bad_code && code >> f.bits()) report(bad_code, row * f.cols + col);
    }
    s.codes[r][k] = code;
  }
  __syncthreads();
}

// Threads 0..127: the mask of chunk threadIdx.x; then the places of all.
__device__ void stage_chunks(const Sizes& z, Stage& s) {
  const int chunk = threadIdx.x;
  if (chunk < kChunks) {
    const int r0 = chunk / 4 % 4 * 16, k0 = chunk / 16 * 16 + chunk % 4 * 4;
    uint64_t mask = 0;
    for (int i = 0; i < 64; ++i) {
      const int r = r0 + i / 4;
      const bool kept = s.codes[r][k0 + i % 4] != s.zero[k0 >> z.shift][r];
      mask |= static_cast<uint64_t>(kept) << i;
    }
    s.mask[chunk] = mask;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const int sum = scan_chunks(s.mask, s.starts, static_cast<int>(threadIdx.x));
    if (threadIdx.x == 0) s.values = sum;
  }
  __syncthreads();
}

// The first column of the first `rows` rows of a chunk: a row is a nibble.
__device__ uint64_t run_of(int rows) { return 0x1111111111111111ull >> (64 - 4 * rows); }

// The most kept of any `rows` consecutive rows of a column of a chunk.
__device__ int most_of_rows(uint64_t mask, int rows) {
  const uint64_t run = run_of(rows);
  int most = 0;
#pragma unroll 1
  for (int r = 0; r < 16; r += rows)
#pragma unroll
    for (int c = 0; c < 4; ++c) most = max(most, __popcll(mask >> (4 * r + c) & run));
  return most;
}

__global__ void __launch_bounds__(kThreads) survey_kernel(const Survey p, const Sizes z) {
  __shared__ Stage s;
  __shared__ int most[kSurvey];
  for (int64_t rt = blockIdx.y; rt < z.tall; rt += gridDim.y) {
    if (threadIdx.x < kSurvey) most[threadIdx.x] = 0;
    stage_tile(p.f, z, p.codes, p.zeros, rt, blockIdx.x, nullptr, s);
    stage_chunks(z, s);
    if (threadIdx.x < kChunks) {
      const uint64_t mask = s.mask[threadIdx.x];
      int columns = 0;
      for (int r = 0; r < 16; ++r) columns = max(columns, __popcll(mask >> 4 * r & 15));
      atomicMax(&most[kMostOf4Columns], columns);
      atomicMax(&most[kMostOf4Rows], most_of_rows(mask, 4));
      atomicMax(&most[kMostOf8Rows], most_of_rows(mask, 8));
    }
    __syncthreads();
    if (threadIdx.x < kSurvey)
      p.out[(rt * z.wide + blockIdx.x) * kSurvey + threadIdx.x] =
          threadIdx.x == kValueBytes ? s.values : most[threadIdx.x];
    __syncthreads();  // the stage is overwritten by the next tile
  }
}

// Inf and NaN have all the bits of the exponent.
template <class Bits>
__device__ void put_scale(const Pack& p, uint8_t* scales, int at, int64_t i) {
  const Bits bits = i < 0 ? Bits{0} : static_cast<const Bits*>(p.scales)[i];
  reinterpret_cast<Bits*>(scales)[at] = bits;
  const uint32_t all = p.f.scale == Dtype::f32    ? 0x7f800000u
                       : p.f.scale == Dtype::bf16 ? 0x7f80u
                                                  : 0x7c00u;
  if ((bits & all) == all) report(p.bad + kBadScale, i);
}

__device__ void put_grid(const Pack& p, const Sizes& z, int64_t rt, int64_t ct, uint8_t* scales,
                         uint8_t* zeros) {
  const Format& f = p.f;
  over_grid(f, z, rt, ct, [&](int q, int r, int64_t i) {
    const int at = q * kTileRows + r;
    if (f.scale == Dtype::f32)
      put_scale<uint32_t>(p, scales, at, i);
    else
      put_scale<uint16_t>(p, scales, at, i);
    if (f.symmetric) return;
    zeros[at] = i < 0 ? static_cast<uint8_t>(f.symmetric_zero()) : p.zeros[i];
    if (i >= 0 && p.zeros[i] >> f.bits()) report(p.bad + kBadZero, i);
  });
}

// Word w of a dense body. Rows of word w: see word_of.
__device__ uint32_t dense_word(Kind kind, const Stage& s, int w) {
  uint32_t out = 0;
  const int r = w / 128 % 2 * 32 + w % 32, block = w / 256, quarter = w / 32 % 4;
  switch (kind) {
    case Kind::int8:
      for (int i = 0; i < 4; ++i)
        out |= static_cast<uint32_t>(s.codes[r][block * 16 + quarter * 4 + i])
               << place_int8(0, i).bit;
      return out;
    case Kind::int3: {
      if (w < 512) {
        for (int i = 0; i < 16; ++i)
          out |= (s.codes[r][block * 64 + quarter * 16 + i] & 3u) << place_int3_low(0, i).bit;
      } else {  // block 0 of the words from 512 on
        for (int i = 0; i < 32; ++i)
          out |= (s.codes[r][quarter * 32 + i] >> 2 & 1u) << place_int3_high(0, i).bit;
      }
      return out;
    }
    default:
      for (int i = 0; i < 8; ++i)
        out |= (s.codes[r][block * 32 + quarter * 8 + i] & 15u) << place_int4(0, i).bit;
      return out;
  }
}

// The pair that is stored of the group of 4 columns from k on; reports one that keeps more than 2.
__device__ uint32_t pair_at(const Pack& p, const Sizes& z, const Stage& s, int64_t rt, int64_t ct,
                            int r, int k) {
  const uint8_t zero = s.zero[k >> z.shift][r];
  uint32_t kept = 0;
  for (int i = 0; i < 4; ++i) kept |= static_cast<uint32_t>(s.codes[r][k + i] != zero) << i;
  const uint32_t pair = pair_of(kept);
  if (pair == 0) report(p.bad + kBadPattern, (rt * kTileRows + r) * p.f.cols + ct * kTileCols + k);
  return pair;
}

__device__ uint32_t word_24(const Pack& p, const Sizes& z, const Stage& s, int64_t rt, int64_t ct,
                            int w) {
  uint32_t out = 0;
  if (w < 512) {
    const int r = w / 128 % 2 * 32 + w % 32, k0 = w / 256 * 64 + w / 32 % 4 * 16;
    for (int i = 0; i < 4; ++i) {
      const int k = k0 + 4 * i;
      const uint32_t pair = pair_at(p, z, s, rt, ct, r, k);
      out |= (s.codes[r][k + (pair & 3)] & 15u) << place_24(0, 4 * i, 0).bit;
      out |= (s.codes[r][k + (pair >> 2)] & 15u) << place_24(0, 4 * i, 1).bit;
    }
    return out;
  }
  const int block = (w - 512) / 128, i = w / 32 % 4;
  for (int half = 0; half < 2; ++half)
    for (int q = 0; q < 4; ++q) {
      const int r = w % 32 + 32 * half, k = 64 * block + 16 * q + 4 * i;
      out |= pair_at(p, z, s, rt, ct, r, k) << place_24_meta(r, k).bit;
    }
  return out;
}

// Threads 0..127: the kept codes of one chunk each; `room` bytes are filled up with zeros.
__device__ void write_chunk(const Stage& s, uint8_t* out, int room) {
  const int chunk = threadIdx.x, r0 = chunk / 4 % 4 * 16, k0 = chunk / 16 * 16 + chunk % 4 * 4;
  uint32_t byte = 0;
  int count = 0;
  for (uint64_t left = s.mask[chunk]; left; left &= left - 1, ++count) {
    const int bit = __ffsll(static_cast<long long>(left)) - 1;
    const uint32_t code = s.codes[r0 + bit / 4][k0 + bit % 4] & 15u;
    if (count % 2)
      out[count / 2] = static_cast<uint8_t>(byte | code << 4);
    else
      byte = code;
  }
  if (count % 2) out[count / 2] = static_cast<uint8_t>(byte);
  for (int i = (count + 1) / 2; i < room; ++i) out[i] = 0;
}

// Every group of a chunk that keeps more than n of m rows; the chunk begins at (row, col).
__device__ void report_crowded(const Format& f, int64_t* bad, int64_t row, int64_t col,
                               uint64_t mask) {
  const uint64_t run = run_of(f.m);
#pragma unroll 1
  for (int i = 0; i < 64; i += i % 4 == 3 ? 4 * f.m - 3 : 1)
    if (__popcll(mask >> i & run) > f.n) report(bad, (row + i / 4) * f.cols + col + i % 4);
}

__device__ void pack_chunks(const Pack& p, const Sizes& z, int64_t rt, int64_t ct, uint8_t* record,
                            Stage& s) {
  const Format& f = p.f;
  const int chunk = threadIdx.x;
  const int each = z.chunk_values;
  const bool crowded = each && chunk < kChunks && most_of_rows(s.mask[chunk], f.m) > f.n;
  if (crowded)
    report_crowded(f, p.bad + kBadPattern, rt * kTileRows + chunk / 4 % 4 * 16,
                   ct * kTileCols + chunk / 16 * 16 + chunk % 4 * 4, s.mask[chunk]);
  if (__syncthreads_or(crowded)) return;  // its codes would not fit in here
  uint8_t* body = record + z.body_at;
  if (chunk < kChunks) {
    reinterpret_cast<uint64_t*>(body)[chunk] = s.mask[chunk];
    write_chunk(s, body + kMaskBytes + (each ? chunk * each : s.starts[chunk]), each);
  }
  if (!each) {
    const int64_t end = z.mask_record(s.values);
    for (int64_t i = z.body_at + kMaskBytes + s.values + chunk; i < end; i += kThreads)
      record[i] = 0;
  }
}

__device__ void pack_tile(const Pack& p, const Sizes& z, int64_t rt, int64_t ct, Stage& s) {
  const Format& f = p.f;
  const int64_t tile = rt * z.wide + ct;
  stage_tile(f, z, p.codes, p.zeros, rt, ct, p.bad + kBadCode, s);
  const bool chunks = f.kind == Kind::int4_mask || f.kind == Kind::int4_out;
  if (chunks) stage_chunks(z, s);
  uint8_t* record = p.data + tile * z.record;
  if (f.kind == Kind::int4_mask) {
    const int64_t begin = p.offsets[tile], end = p.offsets[tile + 1];
    if (begin < z.offsets || begin % 16 || end - begin != z.mask_record(s.values) ||
        end > p.bytes - z.section - kTail) {
      if (threadIdx.x == 0) report(p.bad + kBadRecord, tile);
      return;
    }
    record = p.data + begin;
  }
  if (f.group) put_grid(p, z, rt, ct, record, record + z.zeros_at);
  if (chunks) return pack_chunks(p, z, rt, ct, record, s);
  auto* body = reinterpret_cast<uint32_t*>(record + z.body_at);
#pragma unroll 1
  for (int w = threadIdx.x; w < f.body_bytes() / 4; w += kThreads)
    body[w] = f.kind == Kind::int4_24 ? word_24(p, z, s, rt, ct, w) : dense_word(f.kind, s, w);
}

template <Kind kKind>
__global__ void __launch_bounds__(kThreads, 3) pack_kernel(const Pack any, const Sizes z) {
  __shared__ Stage s;
  const Pack p = of_kind<kKind>(any);
  const Format& f = p.f;
  const int64_t ct = blockIdx.x;
  for (int64_t rt = blockIdx.y; rt < z.tall; rt += gridDim.y) {
    if (!f.group && ct == 0) {
      const Grid at = row_grid_at(f, z, p.data + p.bytes - kTail - z.section, rt);
      put_grid(p, z, rt, 0, const_cast<uint8_t*>(at.scales), const_cast<uint8_t*>(at.zeros));
    }
    if (ct < z.wide) pack_tile(p, z, rt, ct, s);
    __syncthreads();  // the stage is overwritten by the next tile
  }
  if (f.kind == Kind::int4_mask && ct == 0 && blockIdx.y == 0 && threadIdx.x == 0 &&
      p.offsets[z.tall * z.wide] + z.section + kTail != p.bytes)
    report(p.bad + kBadRecord, z.tall * z.wide);
}

}  // namespace

void survey_cuda(const Survey& p, int device, Stream stream) {
  const cuda::DeviceGuard guard(device);
  const Sizes z(p.f);
  cuda::launch(survey_kernel, grid_of_tiles(z.tall, z.wide), kThreads, 0, cuda::raw(stream), p, z);
}

void pack_cuda(const Pack& p, int device, Stream stream) {
  const cuda::DeviceGuard guard(device);
  const cudaStream_t s = cuda::raw(stream);
  const Format& f = p.f;
  if (f.kind == Kind::int4_mask) {
    cuda::check_cuda(cudaMemsetAsync(p.data, 0, static_cast<size_t>(f.offsets_bytes()), s));
    cuda::check_cuda(cudaMemcpyAsync(p.data, p.offsets,
                                     static_cast<size_t>(f.tiles() + 1) * sizeof(int64_t),
                                     cudaMemcpyDeviceToDevice, s));
  }
  cuda::check_cuda(cudaMemsetAsync(p.data + p.bytes - kTail, 0, kTail, s));
  const Sizes z(f);
  over_kind(f.kind, [&]<Kind kKind>() {
    cuda::launch(pack_kernel<kKind>, grid_of_tiles(z.tall, z.wide), kThreads, 0, s, p, z);
  });
}

}  // namespace distaya::pack
