// A thread block per row: hidden states are compared in fp64, from the caches the second time; the
// logits of a block of the vocabulary come from one product for all rows of P and Q, in 16 bits
// (product.cuh) or fp32 (core/gemm).
// Nothing is allocated, copied to the host or waited for (influence.h has the formulas).
//
// Counted for a hidden size of 4096: a product in bf16 takes 8192 operations per logit, at least 8
// ps of an H100's tensor cores, three in tf32 at least 50; writing and reading the logit moves 12
// bytes of it, 4 ps of memory and less where it stays in the L2 cache, for which blocks are sized.
#include "core/cuda.cuh"
#include "core/gemm.cuh"
#include "influence/influence.h"
#include "influence/product.cuh"
#include "influence/rows.cuh"

namespace distaya {
namespace {

using namespace cuda;
using influence::block_sums, influence::kThreads, influence::similarity_kernel;

constexpr int kEach = static_cast<int>(kColumnsCuda) / kThreads;  // logits of a thread in a row

// Device scratch, laid out once; every part starts at a multiple of 256 bytes.
struct Work {
  float* h;        // [rows, pitch] rows of P, then those of each Q
  float* W;        // [kColumnsCuda, pitch]
  float* z;        // [rows, kColumnsCuda]
  float* bias;     // [kColumnsCuda]
  float* target;   // [rows] the target's logit, NaN until it has come
  Side* sides;     // [rows]
  double* a;       // [rows], the first `tokens` of them not used
  double* shrink;  // [tokens] what `a` is to be multiplied by in this block
  int64_t pitch;   // hidden, so that rows start at multiples of 16 bytes
  int64_t bytes;
};

Work lay_out(void* base, const Run& run, int64_t hidden) {
  Work w{};
  Arena arena{base};
  w.pitch = ceil_div<int64_t>(hidden, 4) * 4;
  w.h = arena.take<float>(run.rows() * w.pitch);
  w.W = arena.take<float>(kColumnsCuda * w.pitch);
  w.z = arena.take<float>(run.rows() * kColumnsCuda);
  w.bias = arena.take<float>(kColumnsCuda);
  w.target = arena.take<float>(run.rows());
  w.sides = arena.take<Side>(run.rows());
  w.a = arena.take<double>(run.rows());
  w.shrink = arena.take<double>(run.tokens);
  w.bytes = arena.bytes;
  return w;
}

// rows x cols elements as fp32, rows of `to` at a distance of `pitch`.
template <class T>
__global__ void __launch_bounds__(kThreads)
    widen_kernel(const T* from, int64_t rows, int64_t cols, float* to, int64_t pitch) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x)
#pragma unroll 4
    for (int64_t j = threadIdx.x; j < cols; j += kThreads)
      to[i * pitch + j] = load_float(from + i * cols + j);
}

__global__ void __launch_bounds__(kThreads) begin_kernel(const Work w, int64_t rows) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows) return;
  w.sides[i] = fresh_side();
  w.target[i] = NAN;
  w.a[i] = 0;
}

// A block of the vocabulary, and whose tokens are in Work.
struct Block {
  int64_t first;   // vocabulary entry
  int n;           // how many, at most kColumnsCuda
  int64_t tokens;  // in Work
  int64_t t0;      // number of the first of them
};

__device__ inline float logit(const Divergence& p, const Work& w, float z, int j) {
  if (p.bias) z += w.bias[j];
  z *= p.scale;
  return p.cap > 0 ? p.cap * tanhf(z / p.cap) : z;
}

struct Peak {
  float most;
  int place;
};

__device__ inline Peak higher(Peak a, Peak b) {
  const bool second = b.most > a.most || (b.most == a.most && b.place < a.place);
  return second ? b : a;
}

// The largest logit of the block's row and its first place, for every thread.
__device__ Peak block_peak(Peak x, Peak (&part)[kThreads / 32]) {
  for (int d = 16; d > 0; d /= 2)
    x = higher(x, {__shfl_xor_sync(kFullWarp, x.most, d), __shfl_xor_sync(kFullWarp, x.place, d)});
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  x = part[0];
  for (int w = 1; w < kThreads / 32; ++w) x = higher(x, part[w]);
  __syncthreads();
  return x;
}

// The logits of row i of Work into z (a thread's are kThreads apart), m, best and target, for every
// thread; what the sums so far are to be multiplied by.
__device__ double take_row(const Divergence& p, const Work& w, const Block& b, int64_t i,
                           float (&z)[kEach], Side& side, Peak (&part)[kThreads / 32]) {
  const int64_t target = p.targets[b.t0 + i % b.tokens] - b.first;
  Peak peak{-INFINITY, INT32_MAX};
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int j = e * kThreads + static_cast<int>(threadIdx.x);
    z[e] = -INFINITY;
    if (j >= b.n) continue;
    z[e] = logit(p, w, w.z[i * kColumnsCuda + j], j);
    peak = higher(peak, {z[e], j});
    if (j == target) w.target[i] = z[e];
  }
  peak = block_peak(peak, part);
  side = w.sides[i];
  if (!(peak.most > side.m)) return 1;
  const double shrink = exp(static_cast<double>(side.m) - static_cast<double>(peak.most));
  side.m = peak.most, side.best = b.first + peak.place;
  return shrink;
}

// Rows of P: their logits stay in Work for the others.
__global__ void __launch_bounds__(kThreads)
    first_kernel(const Divergence p, const Work w, const Block b) {
  __shared__ Peak peaks[kThreads / 32];
  __shared__ double sums[1][kThreads / 32];
  for (int64_t i = blockIdx.x; i < b.tokens; i += gridDim.x) {
    float z[kEach];
    Side side;
    const double shrink = take_row(p, w, b, i, z, side, peaks);
    double s[1] = {};
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int j = e * kThreads + static_cast<int>(threadIdx.x);
      if (j >= b.n) break;
      w.z[i * kColumnsCuda + j] = z[e];
      s[0] += expf(z[e] - side.m);
    }
    block_sums(s, sums);
    if (threadIdx.x != 0) continue;
    side.s = side.s * shrink + s[0];
    w.sides[i] = side;
    w.shrink[i] = shrink;
  }
}

// Rows of every Q.
__global__ void __launch_bounds__(kThreads)
    other_kernel(const Divergence p, const Work w, const Block b, int64_t rows) {
  __shared__ Peak peaks[kThreads / 32];
  __shared__ double sums[2][kThreads / 32];
  for (int64_t i = b.tokens + blockIdx.x; i < rows; i += gridDim.x) {
    float z[kEach];
    Side side;
    const double shrink = take_row(p, w, b, i, z, side, peaks);
    const int64_t t = i % b.tokens;
    const float m = w.sides[t].m;
    double s[2] = {};
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int j = e * kThreads + static_cast<int>(threadIdx.x);
      if (j >= b.n) break;
      const float x = w.z[t * kColumnsCuda + j], power = expf(x - m);
      s[0] += expf(z[e] - side.m);
      if (power != 0) s[1] += power * (x - z[e]);  // -Inf - -Inf does not count
    }
    block_sums(s, sums);
    if (threadIdx.x != 0) continue;
    side.s = side.s * shrink + s[0];
    w.sides[i] = side;
    w.a[i] = w.a[i] * w.shrink[t] + s[1];
  }
}

// One thread per row of a Q.
__global__ void __launch_bounds__(kThreads)
    conclude_kernel(const Divergence p, const Work w, const Run run, int64_t v0, int64_t t0) {
  const int64_t i = run.tokens + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= run.rows()) return;
  const int64_t t = i % run.tokens, v = i / run.tokens - 1;
  Side first = w.sides[t], other = w.sides[i];
  first.target = w.target[t], other.target = w.target[i];
  conclude(first, other, w.a[i], p.out + 4 * ((v0 + v) * p.tokens + t0 + t));
}

void widen(const void* from, Dtype dtype, int64_t first, int64_t rows, int64_t cols, float* to,
           int64_t pitch, cudaStream_t s) {
  dispatch<float, bf16, f16>(dtype, "a matrix", [&]<class T>() {
    launch(widen_kernel<T>, grid_of(rows), kThreads, 0, s,
           static_cast<const T*>(from) + first * cols, rows, cols, to, pitch);
  });
}

unsigned grid_of_elements(int64_t n) { return grid_of(ceil_div<int64_t>(n, kThreads)); }

// A run and where it begins.
struct Part : Run {
  int64_t t0, v0;
};

// Whether rows can be multiplied as they are: 16 bits, one dtype, aligned to 16 bytes.
bool as_they_are(const Divergence& p) {
  const auto addresses = reinterpret_cast<uintptr_t>(p.P) | reinterpret_cast<uintptr_t>(p.Q) |
                         reinterpret_cast<uintptr_t>(p.W);
  return p.w_dtype != Dtype::f32 && p.p_dtype == p.w_dtype && p.q_dtype == p.w_dtype &&
         p.hidden % 8 == 0 && addresses % 16 == 0;
}

// z = h W^T for the block's rows of W.
void multiply_block(const Divergence& p, const Work& w, const Part& part, const Block& b,
                    cudaStream_t s) {
  if (as_they_are(p))
    return dispatch<bf16, f16>(p.w_dtype, "W", [&]<class T>() {
      const auto *P = static_cast<const T*>(p.P), *Q = static_cast<const T*>(p.Q),
                 *W = static_cast<const T*>(p.W);
      influence::multiply<T>({.P = P + part.t0 * p.hidden,
                              .Q = Q + (part.v0 * p.tokens + part.t0) * p.hidden,
                              .W = W + b.first * p.hidden,
                              .tokens = part.tokens,
                              .stride = p.tokens * p.hidden,
                              .hidden = p.hidden,
                              .rows = part.rows(),
                              .columns = b.n,
                              .z = w.z,
                              .ldz = kColumnsCuda},
                             s);
    });
  const bool wide = p.w_dtype == Dtype::f32;
  if (!wide) widen(p.W, p.w_dtype, b.first, b.n, p.hidden, w.W, w.pitch, s);
  gemm({.m = part.rows(),
        .n = b.n,
        .k = p.hidden,
        .alpha = 1.0f,
        .A = w.h,
        .a_row = w.pitch,
        .a_col = 1,
        .B = wide ? static_cast<const float*>(p.W) + b.first * p.hidden : w.W,
        .b_row = 1,
        .b_col = wide ? p.hidden : w.pitch,
        .C = w.z,
        .ldc = kColumnsCuda,
        .overwrite = true},
       s);
}

void diverge(const Divergence& p, const Work& w, const Part& part, cudaStream_t s) {
  const int64_t rows = part.rows(), others = rows - part.tokens;
  if (!as_they_are(p)) {
    widen(p.P, p.p_dtype, part.t0, part.tokens, p.hidden, w.h, w.pitch, s);
    for (int64_t v = 0; v < part.variants; ++v)
      widen(p.Q, p.q_dtype, (part.v0 + v) * p.tokens + part.t0, part.tokens, p.hidden,
            w.h + (1 + v) * part.tokens * w.pitch, w.pitch, s);
  }
  launch(begin_kernel, grid_of_elements(rows), kThreads, 0, s, w, rows);
  for (int64_t j = 0; j < p.vocabulary; j += kColumnsCuda) {
    const int64_t left = p.vocabulary - j;
    const Block b{.first = j,
                  .n = static_cast<int>(left < kColumnsCuda ? left : kColumnsCuda),
                  .tokens = part.tokens,
                  .t0 = part.t0};
    if (p.bias) widen(p.bias, p.bias_dtype, b.first, b.n, 1, w.bias, 1, s);
    multiply_block(p, w, part, b, s);
    launch(first_kernel, grid_of(part.tokens), kThreads, 0, s, p, w, b);
    launch(other_kernel, grid_of(others), kThreads, 0, s, p, w, b, rows);
  }
  launch(conclude_kernel, grid_of_elements(others), kThreads, 0, s, p, w, Run(part), part.v0,
         part.t0);
}

}  // namespace

void similarity_cuda(const Similarity& p, Stream stream) {
  const DeviceGuard guard(p.device);
  dispatch<float, bf16, f16>(p.dtype, "X", [&]<class T>() {
    launch(similarity_kernel<T>, grid_of(p.tokens), kThreads, 0, raw(stream), p);
  });
}

int64_t divergence_work_cuda(int64_t variants, int64_t tokens, int64_t hidden) {
  return lay_out(nullptr, run_of(variants, tokens, kRowsCuda), hidden).bytes;
}

void divergence_cuda(const Divergence& p, Stream stream) {
  const DeviceGuard guard(p.device);
  const Run most = run_of(p.variants, p.tokens, kRowsCuda);
  const Work w = lay_out(p.work, most, p.hidden);
  for (int64_t v = 0; v < p.variants; v += most.variants)
    for (int64_t t = 0; t < p.tokens; t += most.tokens) {
      const int64_t variants = p.variants - v, tokens = p.tokens - t;
      const Run run{variants < most.variants ? variants : most.variants,
                    tokens < most.tokens ? tokens : most.tokens};
      diverge(p, w, Part{run, t, v}, raw(stream));
    }
}

}  // namespace distaya
