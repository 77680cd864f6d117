// y = x W^T on the device, always in the exact form (sqgemm.h). Weights stream through shared
// memory as packed; a warp multiplies whole tiles on the tensor cores. Where row tiles are few the
// columns are split among blocks, whose sums are added in their order by a second kernel: the same
// bits every run. No atomics, no host sync, no allocation.
#include "sqgemm/block.cuh"
#include "sqgemm/expand.cuh"
#include "sqgemm/launch.cuh"
#include "sqgemm/multiply.cuh"

namespace distaya::sqgemm {
namespace {

using namespace cuda;

// T: the type of the activations' terms; Out: of y and the biases.
template <class T, class Out, int n_tiles, int parts, Body body>
__global__ void __launch_bounds__(kThreads, resident_blocks(n_tiles* parts, body == Body::int8))
    multiply_kernel(const __grid_constant__ Launch p) {
  DISTAYA_DYNAMIC_SHARED(uint8_t, shared);
  constexpr int kActivations = parts * n_tiles * 8 * pack::kTileCols * 2;  // bytes, of one way
  __shared__ uint32_t selectors[16];
  __shared__ Task tasks[kWarps];
  static_assert(sizeof selectors + sizeof tasks <= kOwnShared);
  ptx::let_later_start();
  const Plan& plan = p.plan;
  const int warp = threadIdx.x / 32;
  if (threadIdx.x < 16) selectors[threadIdx.x] = spread_selector(threadIdx.x);
  if (threadIdx.x % 32 == 0) tasks[warp] = task_of(p);
  __syncthreads();
  const Task& w = tasks[warp];
  uint8_t* rows = shared + plan.grid_at + warp * pack::kTileRows * 5;
  for (int step = 0; step < plan.stages; ++step) {
    const int tile = w.first_tile + step * plan.ways + w.way;
    if (tile < w.end_tile) prefetch_record(p, w, tile);
  }
  ptx::wait_for_earlier();
  if (p.format.group == 0) copy_row_scales(p.format, w.weights, w.row_tile, rows);

  const auto stage_of = [&](int step) {
    return shared + (plan.stages == 3 ? step % 3 : step % 2) * plan.stage_bytes;
  };
  const auto issue = [&](int step) {
    uint8_t* stage = stage_of(step);
    const int tile = w.first_tile + step * plan.ways;
    if (tile + w.way < w.end_tile)
      stage_record(p, w, tile + w.way, stage + warp * plan.record_bytes);
    stage_activations<n_tiles, parts>(p, w, tile, stage + kWarps * plan.record_bytes);
  };

  float sum[4][n_tiles][4] = {};
  const int steps = w.steps;
  for (int step = 0; step < plan.stages - 1; ++step) {
    if (step < steps) issue(step);
    ptx::copy_commit();
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if (plan.stages == 3)
      ptx::copy_wait<1>();
    else
      ptx::copy_wait<0>();
    __syncthreads();  // this step has arrived for all, and all have left the stage issued next
    if (step + plan.stages - 1 < steps) issue(step + plan.stages - 1);
    ptx::copy_commit();
    if (w.first_tile + step * plan.ways + w.way >= w.end_tile) continue;
    const uint8_t* stage = stage_of(step);
    const uint8_t* record = stage + warp * plan.record_bytes;
    const uint8_t* codes = record + plan.body_at;
    const Scales scales{p.format.group == 0 ? rows : record, p.format};
    if (body == Body::int4 && p.format.kind != Kind::int4) {
      uint8_t* words = shared + plan.expanded_at + warp * (pack::kTileWeights / 2);
      __syncwarp();  // all lanes have read the tile before
      if (p.format.kind == Kind::int3)
        expand_int3(codes, words);
      else
        expand_mask(p.format, scales, codes, selectors, words);
      __syncwarp();
      codes = words;
    }
    const uint8_t* x = stage + kWarps * plan.record_bytes;
    multiply_tile<T, body, n_tiles, parts>(sum, codes, scales, x + w.way * kActivations);
  }
  ptx::copy_wait<0>();
  __syncthreads();  // the stages are free for the sums
  auto* sums = reinterpret_cast<float*>(shared);
  share_sums<n_tiles>(sum, sums);
  __syncthreads();
  write_sums<Out>(p, sums);
}

// [parts][tokens][stride] from x [tokens, cols]: padded with zeros; float32 as three bf16 that add
// up to it exactly, but for what lies below 2^-133, the least bf16: each term takes the leading 8
// bits of what those before left.
template <class T>
__global__ void prepare_kernel(const T* x, int64_t tokens, int64_t cols, int64_t stride,
                               uint16_t* out) {
  ptx::let_later_start();
  ptx::wait_for_earlier();
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < tokens * stride;
       i += step) {
    const int64_t token = i / stride, column = i % stride;
    const bool there = column < cols;
    if constexpr (dtype_of<T> == Dtype::f32) {
      float rest = there ? x[token * cols + column] : 0.f;
      for (int part = 0; part < 3; ++part) {
        uint32_t bits = __float_as_uint(rest);
        if (rest != rest) bits = 0x7fff0000u;  // a NaN must not lose all its bits
        out[part * tokens * stride + i] = static_cast<uint16_t>(bits >> 16);
        const float taken = __uint_as_float(bits & 0xffff0000u);
        rest = isfinite(taken) ? rest - taken : 0.f;
      }
    } else {
      out[i] = there ? x[token * cols + column].bits : uint16_t{0};
    }
  }
}

// 16-bit activations as the kernel wants them: where they are, if possible.
template <class T>
void prepare(const Problem& p, Launch& launch, cudaStream_t stream) {
  const int64_t stride = p.format.col_tiles() * pack::kTileCols;
  launch.x_stride = stride;
  launch.x = p.x;
  const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  if (dtype_of<T> != Dtype::f32 && stride == p.format.cols && aligned) return;
  launch.x = p.work;
  cuda::launch<true>(prepare_kernel<T>, grid_of(ceil_div<int64_t>(p.tokens * stride, 256), 1 << 16),
                     256, 0, stream, static_cast<const T*>(p.x), p.tokens, p.format.cols, stride,
                     static_cast<uint16_t*>(p.work));
}

template <class T, class Out, int n_tiles, int parts, Body body>
void multiply(const Launch& p, cudaStream_t stream) {
  constexpr auto kernel = multiply_kernel<T, Out, n_tiles, parts, body>;
  allow_shared<kernel>(p.device, kMostShared);
  const int64_t blocks = p.plan.row_blocks * p.plan.passes;
  check(blocks < int64_t{1} << 31, "x of ", p.out.tokens, " tokens by a weight of ", p.out.rows,
        " rows is too much for one launch");
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.plan.splits));
  cuda::launch<true>(kernel, grid, kThreads, static_cast<size_t>(p.plan.shared_bytes), stream, p);
}

template <class T, class Out, int n_tiles, int parts>
void multiply_kind(const Launch& p, cudaStream_t stream) {
  if (p.format.kind == Kind::int8) return multiply<T, Out, n_tiles, parts, Body::int8>(p, stream);
  if (p.format.kind == Kind::int4_24)
    return multiply<T, Out, n_tiles, parts, Body::sparse>(p, stream);
  multiply<T, Out, n_tiles, parts, Body::int4>(p, stream);
}

template <class T>
void run(const Problem& p, Launch& launch, cudaStream_t stream) {
  if (p.format.cols > 0) prepare<T>(p, launch, stream);
  const int n = launch.plan.n_tiles;
  if constexpr (dtype_of<T> == Dtype::f32) {
    n == 1 ? multiply_kind<bf16, float, 1, 3>(launch, stream)
           : multiply_kind<bf16, float, 2, 3>(launch, stream);
  } else {
    n == 1   ? multiply_kind<T, T, 1, 1>(launch, stream)
    : n == 2 ? multiply_kind<T, T, 2, 1>(launch, stream)
    : n == 4 ? multiply_kind<T, T, 4, 1>(launch, stream)
             : multiply_kind<T, T, 8, 1>(launch, stream);
  }
  if (launch.plan.splits == 1) return;
  const int64_t padded = p.format.row_tiles() * pack::kTileRows;
  add_splits<T>({launch.out, launch.partial, launch.plan.splits, padded, launch.plan.matrices},
                stream);
}

}  // namespace

int64_t cuda_work_bytes(const pack::Format& format, int64_t tokens, Dtype dtype, bool glu) {
  const Plan plan = make_plan(format, tokens, dtype, glu);
  return plan.x_bytes + plan.partial_bytes;
}

void run_cuda(const Problem& p, Stream stream) {
  if (p.tokens == 0 || p.format.rows == 0) return;
  const DeviceGuard guard(p.device);
  Launch launch{};
  launch.plan = make_plan(p.format, p.tokens, p.dtype, p.up != nullptr);
  const int64_t wanted = launch.plan.x_bytes + launch.plan.partial_bytes;
  check(p.work_bytes >= wanted, "work has ", p.work_bytes, " bytes but this product needs ",
        wanted);
  for (const uint8_t* data : {p.weights, p.up})
    check(reinterpret_cast<uintptr_t>(data) % 16 == 0,
          "packed weights must begin at a multiple of ", "16 bytes");
  launch.out = {p.y, p.bias, p.up_bias, p.tokens, p.format.rows, p.act, p.up != nullptr};
  launch.format = p.format;
  launch.device = p.device;
  launch.weights[0] = p.weights;
  launch.weights[1] = p.up;
  launch.partial = reinterpret_cast<float*>(static_cast<uint8_t*>(p.work) + launch.plan.x_bytes);
  dispatch<float, f16, bf16>(p.dtype, "x", [&]<class T>() { run<T>(p, launch, raw(stream)); });
}

}  // namespace distaya::sqgemm
