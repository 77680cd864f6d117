// The blocked OBS sweep on the device (obs.h has the formulas). Per block of columns: invert the
// diagonal block of R, one panel GEMM for the weights on entry, choose the mask where it is chosen
// over all rows, then one fused kernel in which a warp owns a row. No host sync, no float atomics.
#include "core/cuda.cuh"
#include "core/gemm.cuh"
#include "obs/obs.h"
#include "obs/obs_grid.cuh"
#include "obs/obs_select.cuh"

namespace distaya {
namespace {

using namespace cuda;

constexpr int kB = static_cast<int>(kObsBlock);
constexpr int kSlots = kB / 32;  // columns of the block a lane owns: lane, lane + 32, ...
constexpr int kWarps = 8;        // rows per thread block of the sweep
constexpr int kTriangle = kB * (kB + 1) / 2;

// Device scratch, laid out once; every part starts at a multiple of 256 bytes.
struct Work {
  float* E;       // [rows, cols] deviation from the original weights
  float* T;       // [rows, kB] weights on entry to the block
  float* P;       // [cols, kB] R[:i1, b] U_b
  float* U;       // [kB, kB] R_bb^-1
  float* N;       // [kB, kB] diag(R_bb) U
  float* D;       // [kB] diag(R_bb)^2
  int64_t* ties;  // [rows + 1] scores equal to the threshold, per row, then their running count
  SelectState* state;
  int64_t bytes;
};

Work lay_out(void* base, int64_t rows, int64_t cols) {
  Work w{};
  int64_t offset = 0;
  const auto take = [&](int64_t bytes) {
    char* p = static_cast<char*>(base) + offset;
    offset += ceil_div<int64_t>(bytes, 256) * 256;
    return p;
  };
  w.E = reinterpret_cast<float*>(take(rows * cols * 4));
  w.T = reinterpret_cast<float*>(take(rows * kB * 4));
  w.P = reinterpret_cast<float*>(take(cols * kB * 4));
  w.U = reinterpret_cast<float*>(take(kB * kB * 4));
  w.N = reinterpret_cast<float*>(take(kB * kB * 4));
  w.D = reinterpret_cast<float*>(take(kB * 4));
  w.ties = reinterpret_cast<int64_t*>(take((rows + 1) * 8));
  w.state = reinterpret_cast<SelectState*>(take(sizeof(SelectState)));
  w.bytes = offset;
  return w;
}

// U = R_bb^-1 (thread = column, back substitution), N = diag(R_bb) U, D = diag(R_bb)^2. width <=
// kB.
__global__ void __launch_bounds__(kB)
    invert_block_kernel(const float* R, int64_t ldr, int width, float* U, float* N, float* D) {
  __shared__ float r[kTriangle];  // upper triangle, column by column: (i, j) at j(j+1)/2 + i
  const int j = threadIdx.x;
  for (int t = threadIdx.x; t < width * width; t += kB) {
    const int row = t / width, col = t % width;
    if (row <= col) r[col * (col + 1) / 2 + row] = R[row * ldr + col];
  }
  __syncthreads();
  for (int i = 0; i < kB; ++i) U[i * kB + j] = 0.f;
  if (j < width) {
    U[j * kB + j] = 1.f / r[j * (j + 1) / 2 + j];
    for (int i = j - 1; i >= 0; --i) {
      float s = 0.f;
      for (int k = i + 1; k <= j; ++k) s = fmaf(r[k * (k + 1) / 2 + i], U[k * kB + j], s);
      U[i * kB + j] = -s / r[i * (i + 1) / 2 + i];
    }
    const float d = r[j * (j + 1) / 2 + j];
    D[j] = d * d;
  }
  for (int i = 0; i < kB; ++i)
    N[i * kB + j] = i < width ? r[i * (i + 1) / 2 + i] * U[i * kB + j] : 0.f;
}

// T[row, 0..width) = W[row, i1..i1+width), widened.
template <class T>
__global__ void load_block_kernel(const T* W, int64_t rows, int64_t cols, int64_t i1, int width,
                                  float* out) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; t < rows * kB;
       t += step) {
    const int64_t row = t / kB, j = t % kB;
    out[t] = j < width ? load_float(W + row * cols + i1 + j) : 0.f;
  }
}

// The mask of one N:M group that starts at column j (in slot `slot`) of this warp's row: bit l is
// set when column j + l is pruned. `count` columns compete, count - n go, lower index first among
// equals.
__device__ unsigned prune_group(const float t0, const float t1, const float* D, int j, int count,
                                int n) {
  const int lane = threadIdx.x % 32, source = (j + lane) % 32;
  const float here = __shfl_sync(kFullWarp, t0, source), next = __shfl_sync(kFullWarp, t1, source);
  const float value = (j + lane) / 32 == j / 32 ? here : next;
  const float score = lane < count ? value * value * D[j + lane] : 0.f;
  int rank = 0;
  for (int k = 0; k < count; ++k) {
    const float other = __shfl_sync(kFullWarp, score, k);
    rank += other < score || (other == score && k < lane);
  }
  return __ballot_sync(kFullWarp, lane < count && rank < count - n);
}

// What one sweep launch needs beside Obs.
struct Block {
  const float *T, *N, *D;
  float* E;
  int64_t i1;
  int width;
};

// One warp = one row: 128 steps, each rounding one column and pushing its error to the right.
template <class T>
__global__ void __launch_bounds__(kWarps * 32) sweep_kernel(const Obs p, const Block b) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.rows) return;  // whole warps leave together
  T* W = static_cast<T*>(p.W) + row * p.cols + b.i1;
  const bool quantised = p.grid.bits > 0;

  float t[kSlots], q[kSlots];
  unsigned pruned[kSlots];  // warp-uniform bits of each slot's 32 columns
  uint8_t code[kSlots];
#pragma unroll
  for (int c = 0; c < kSlots; ++c) {
    const int j = c * 32 + lane;
    t[c] = b.T[row * kB + j];
    q[c] = 0.f;
    code[c] = 0;
    const bool from_mask = p.select == Select::given || p.select == Select::unstructured;
    const bool gone = from_mask && j < b.width && !p.mask[row * p.cols + b.i1 + j];
    pruned[c] = __ballot_sync(kFullWarp, gone);
  }

  if (quantised && p.dynamic && p.reference) {  // as published: grids from the entry weights
    for (int j = 0; j < b.width; j += static_cast<int>(p.group)) {
      const int end = j + static_cast<int>(p.group);
      const Fitted fit = fit_grid(p.grid, t, j, end < b.width ? end : b.width);
      const int64_t at = row * p.groups + (b.i1 + j) / p.group;
      if (lane == 0) p.scales[at] = fit.scale, p.zeros[at] = fit.zero;
    }
    __syncwarp();  // lane 0's grids are read by the whole warp below
  }

  double loss = 0;
  float scale = 1.f, zero = 0.f;
#pragma unroll
  for (int c = 0; c < kSlots; ++c) {
#pragma unroll 1
    for (int l = 0; l < 32; ++l) {
      const int j = c * 32 + l;
      if (j >= b.width) break;
      const int64_t column = b.i1 + j;
      if (p.select == Select::nm && column % p.m == 0) {
        const int64_t left = p.cols - column;
        const int count = static_cast<int>(left < p.m ? left : p.m);
        const unsigned bits =
            prune_group(t[c], t[c + 1 < kSlots ? c + 1 : c], b.D, j, count, static_cast<int>(p.n));
        const uint64_t placed = static_cast<uint64_t>(bits) << l;  // may reach into the next slot
        pruned[c] |= static_cast<unsigned>(placed);
        if (c + 1 < kSlots)
          pruned[c + 1 < kSlots ? c + 1 : c] |= static_cast<unsigned>(placed >> 32);
      }
      if (quantised) {
        if (!p.dynamic || p.reference) {
          const int64_t g = row * p.groups + (p.group_of ? p.group_of[column] : column / p.group);
          scale = p.scales[g];
          zero = p.zeros[g];
        } else if (column % p.group == 0) {
          const int64_t end = column + p.group < p.cols ? column + p.group : p.cols;
          const Fitted fit = fit_grid(p.grid, t, j, static_cast<int>(end - b.i1));
          scale = fit.scale;
          zero = fit.zero;
          if (lane == 0) {
            p.scales[row * p.groups + column / p.group] = scale;
            p.zeros[row * p.groups + column / p.group] = zero;
          }
        }
      }
      const float w = __shfl_sync(kFullWarp, t[c], l);
      const bool gone = pruned[c] >> l & 1u;
      float level = zero;  // code of exact zero
      float value = gone ? 0.f : w;
      if (quantised && !gone) {
        level = code_of(w, scale, zero, p.grid.bits);
        value = scale * (level - zero);
      }
      const float g = w - value;
      loss += 0.5 * static_cast<double>(g * g) * static_cast<double>(b.D[j]);
      if (lane == l) {
        q[c] = value;
        code[c] = static_cast<uint8_t>(level);
      }
#pragma unroll
      for (int d = c; d < kSlots; ++d) t[d] = fmaf(-g, b.N[j * kB + d * 32 + lane], t[d]);
    }
  }

#pragma unroll
  for (int c = 0; c < kSlots; ++c) {
    const int j = c * 32 + lane;
    if (j >= b.width) continue;
    const int64_t at = row * p.cols + b.i1 + j;
    b.E[at] = load_float(W + j) - q[c];
    store_float(W + j, q[c]);
    if (p.select == Select::nm) p.mask[at] = !(pruned[c] >> lane & 1u);
    if (quantised) p.codes[at] = code[c];
  }
  if (lane == 0) p.loss[row] = b.i1 == 0 ? loss : p.loss[row] + loss;
}

// T = W0[:, b] + E[:, :i1] (R[:i1, b] U_b)
template <class T>
void enter_block(const Obs& p, const Work& work, int64_t i1, int width, cudaStream_t stream) {
  launch(invert_block_kernel, 1, kB, 0, stream, p.R + i1 * p.cols + i1, p.cols, width, work.U,
         work.N, work.D);
  launch(load_block_kernel<T>, grid_of(ceil_div<int64_t>(p.rows * kB, 256), 1 << 16), 256, 0,
         stream, static_cast<const T*>(p.W), p.rows, p.cols, i1, width, work.T);
  if (i1 == 0) return;
  check_cuda(cudaMemsetAsync(work.P, 0, static_cast<size_t>(i1) * kB * 4, stream));
  gemm({.m = i1,
        .n = width,
        .k = width,
        .alpha = 1.f,
        .A = p.R + i1,
        .a_row = p.cols,
        .a_col = 1,
        .B = work.U,
        .b_row = kB,
        .b_col = 1,
        .C = work.P,
        .ldc = kB},
       stream);
  gemm({.m = p.rows,
        .n = width,
        .k = i1,
        .alpha = 1.f,
        .A = work.E,
        .a_row = p.cols,
        .a_col = 1,
        .B = work.P,
        .b_row = kB,
        .b_col = 1,
        .C = work.T,
        .ldc = kB},
       stream);
}

template <class T>
void run(const Obs& p, cudaStream_t stream) {
  const Work work = lay_out(p.work, p.rows, p.cols);
  const int64_t step = block_columns(p);
  for (int64_t i1 = 0; i1 < p.cols; i1 += step) {
    const int width = static_cast<int>(p.cols - i1 < step ? p.cols - i1 : step);
    enter_block<T>(p, work, i1, width, stream);
    if (p.select == Select::unstructured)
      select_block({.T = work.T,
                    .D = work.D,
                    .rows = p.rows,
                    .cols = p.cols,
                    .i1 = i1,
                    .width = width,
                    .k = prune_count(p, i1, i1 + width),
                    .all_ties = p.reference,
                    .ties = work.ties,
                    .state = work.state,
                    .mask = p.mask},
                   stream);
    const Block block{work.T, work.N, work.D, work.E, i1, width};
    launch(sweep_kernel<T>, grid_of(ceil_div<int64_t>(p.rows, kWarps)), kWarps * 32, 0, stream, p,
           block);
  }
}

}  // namespace

int64_t obs_work_cuda(int64_t rows, int64_t cols) { return lay_out(nullptr, rows, cols).bytes; }

void obs_cuda(const Obs& p, Stream stream) {
  if (p.rows == 0 || p.cols == 0) return;
  const DeviceGuard guard(p.device);
  dispatch<float, f16, bf16>(p.dtype, "W", [&]<class T>() { run<T>(p, raw(stream)); });
}

void quantize_cuda(const Quantize& p, Stream stream) {
  if (p.rows == 0 || p.cols == 0) return;
  const DeviceGuard guard(p.device);
  const int64_t items = p.rows * p.groups;
  dispatch<float, f16, bf16>(p.dtype, "W", [&]<class T>() {
    launch(quantize_kernel<T>, grid_of(ceil_div<int64_t>(items, kWarps)), kWarps * 32, 0,
           raw(stream), p);
  });
}

}  // namespace distaya
