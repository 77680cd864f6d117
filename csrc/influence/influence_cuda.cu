// A thread block per row: hidden states are compared in fp64, from the caches the second time; the
// logits of a block of the vocabulary come from one product (core/gemm) for all rows of P and Q.
// Nothing is allocated, copied to the host or waited for (influence.h has the formulas).
//
// Counted for a hidden size of 4096: three products in tf32 take 24576 operations per logit, at
// least 50 ps of an H100's tensor cores; writing and reading the logit moves 12 bytes of it, which
// is 4 ps of memory and less where they stay in the L2 cache, for which the blocks are sized.
#include "core/cuda.cuh"
#include "core/gemm.cuh"
#include "influence/influence.h"

namespace distaya {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
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
  int64_t offset = 0;
  const auto take = [&](int64_t bytes) {
    char* p = static_cast<char*>(base) + offset;
    offset += ceil_div<int64_t>(bytes, 256) * 256;
    return p;
  };
  const auto floats = [&](int64_t n) { return reinterpret_cast<float*>(take(4 * n)); };
  const auto doubles = [&](int64_t n) { return reinterpret_cast<double*>(take(8 * n)); };
  w.pitch = ceil_div<int64_t>(hidden, 4) * 4;
  w.h = floats(run.rows() * w.pitch);
  w.W = floats(kColumnsCuda * w.pitch);
  w.z = floats(run.rows() * kColumnsCuda);
  w.bias = floats(kColumnsCuda);
  w.target = floats(run.rows());
  w.sides = reinterpret_cast<Side*>(take(run.rows() * static_cast<int64_t>(sizeof(Side))));
  w.a = doubles(run.rows());
  w.shrink = doubles(run.tokens);
  w.bytes = offset;
  return w;
}

// Sums over the block for every thread: a tree over lanes, then the warps in their order. `part` is
// shared memory, free again when this returns.
template <int count>
__device__ void block_sums(double (&x)[count], double (&part)[count][kThreads / 32]) {
#pragma unroll
  for (int c = 0; c < count; ++c) {
    x[c] = warp_sum(x[c]);
    if (threadIdx.x % 32 == 0) part[c][threadIdx.x / 32] = x[c];
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < count; ++c) {
    x[c] = 0;
    for (int w = 0; w < kThreads / 32; ++w) x[c] += part[c][w];
  }
  __syncthreads();
}

// ---- hidden states ----

template <class T>
__global__ void __launch_bounds__(kThreads) similarity_kernel(const Similarity p) {
  __shared__ double sizes[3][kThreads / 32], angles[2][kThreads / 32];
  for (int64_t t = blockIdx.x; t < p.tokens; t += gridDim.x) {
    const T* x = static_cast<const T*>(p.X) + t * p.hidden;
    const T* y = static_cast<const T*>(p.Y) + t * p.hidden;
    double size[3] = {};  // |x|^2, |y|^2, |y - x|^2
#pragma unroll 4
    for (int64_t j = threadIdx.x; j < p.hidden; j += kThreads) {
      const double a = load_float(x + j), b = load_float(y + j), d = b - a;
      size[0] += a * a, size[1] += b * b, size[2] += d * d;
    }
    block_sums(size, sizes);
    const double unit_x = 1 / sqrt(size[0]), unit_y = 1 / sqrt(size[1]);
    double angle[2] = {};
#pragma unroll 4
    for (int64_t j = threadIdx.x; j < p.hidden; j += kThreads) {
      const double a = load_float(x + j) * unit_x, b = load_float(y + j) * unit_y;
      const double minus = a - b, plus = a + b;
      angle[0] += minus * minus, angle[1] += plus * plus;
    }
    block_sums(angle, angles);
    if (threadIdx.x == 0) compare(size[0], size[1], size[2], angle[0], angle[1], p.out + 3 * t);
  }
}

// ---- the head ----

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

void add_block(const Divergence& p, const Work& w, const Run& run, const Block& b, cudaStream_t s) {
  const bool as_it_is = p.w_dtype == Dtype::f32;
  if (!as_it_is) widen(p.W, p.w_dtype, b.first, b.n, p.hidden, w.W, w.pitch, s);
  if (p.bias) widen(p.bias, p.bias_dtype, b.first, b.n, 1, w.bias, 1, s);
  gemm({.m = run.rows(),
        .n = b.n,
        .k = p.hidden,
        .alpha = 1.0f,
        .A = w.h,
        .a_row = w.pitch,
        .a_col = 1,
        .B = as_it_is ? static_cast<const float*>(p.W) + b.first * p.hidden : w.W,
        .b_row = 1,
        .b_col = as_it_is ? p.hidden : w.pitch,
        .C = w.z,
        .ldc = kColumnsCuda,
        .overwrite = true},
       s);
  launch(first_kernel, grid_of(run.tokens), kThreads, 0, s, p, w, b);
  launch(other_kernel, grid_of(run.rows() - run.tokens), kThreads, 0, s, p, w, b, run.rows());
}

// Tokens [t0, t0 + run.tokens) and Qs [v0, v0 + run.variants).
void diverge(const Divergence& p, const Work& w, const Run& run, int64_t t0, int64_t v0,
             cudaStream_t s) {
  widen(p.P, p.p_dtype, t0, run.tokens, p.hidden, w.h, w.pitch, s);
  for (int64_t v = 0; v < run.variants; ++v)
    widen(p.Q, p.q_dtype, (v0 + v) * p.tokens + t0, run.tokens, p.hidden,
          w.h + (1 + v) * run.tokens * w.pitch, w.pitch, s);
  launch(begin_kernel, grid_of_elements(run.rows()), kThreads, 0, s, w, run.rows());
  for (int64_t j = 0; j < p.vocabulary; j += kColumnsCuda) {
    const int64_t left = p.vocabulary - j;
    const int n = static_cast<int>(left < kColumnsCuda ? left : kColumnsCuda);
    add_block(p, w, run, {.first = j, .n = n, .tokens = run.tokens, .t0 = t0}, s);
  }
  launch(conclude_kernel, grid_of_elements(run.rows() - run.tokens), kThreads, 0, s, p, w, run, v0,
         t0);
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
      Run run = most;
      if (p.variants - v < run.variants) run.variants = p.variants - v;
      if (p.tokens - t < run.tokens) run.tokens = p.tokens - t;
      diverge(p, w, run, t, v, raw(stream));
    }
}

}  // namespace distaya
