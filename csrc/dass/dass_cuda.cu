#include "core/cuda.cuh"
#include "dass/dass.h"

namespace distaya::dass {
namespace {

using cuda::ceil_div;
using cuda::grid_of;
using cuda::launch;
using cuda::load_float;

constexpr int kThreads = 256;
constexpr int64_t kMostY = 65535;  // grid limit in y: rows beyond it are strided over

// One thread per column of a row; blockIdx.y is the row.
template <class T>
__global__ void __launch_bounds__(kThreads) score_kernel(const Score p) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  __shared__ double factor;
  for (int64_t i = blockIdx.y; i < p.rows; i += gridDim.y) {
    if (threadIdx.x == 0) factor = raised(p.norms[i], p.power);  // fp64: once for the block
    __syncthreads();
    if (j < p.cols) {
      const double w = load_float(static_cast<const T*>(p.W) + i * p.cols + j);
      p.S[i * p.cols + j] = static_cast<float>(fabs(w) * factor);
    }
    __syncthreads();  // factor is written again for the next row
  }
}

// act(g) and its slope.
template <Act act>
__device__ inline float2 bend(float g) {
  if constexpr (act == Act::gelu) {
    const float half = 0.5f * (1.f + erff(g * 0.70710678118654752f));
    return {g * half, fmaf(g, 0.39894228f * expf(-0.5f * g * g), half)};
  } else {
    // Both are g s(z) with s the logistic function, so the slope is s + g s (1 - s) z'.
    float z = g, rate = 1.f;
    if constexpr (act == Act::gelu_tanh) {
      const float square = g * g;
      z = g * fmaf(square, 0.0713548163f, 1.59576912f);
      rate = fmaf(square, 0.214064449f, 1.59576912f);
    }
    const float e = expf(-z), s = 1.f / (1.f + e);
    const float away = s == 0.f ? 0.f : g * rate * (e * s);  // e s is 1 - s without cancellation
    return {g / (1.f + e), s * (1.f + away)};
  }
}

constexpr int kAcross = 32, kDown = 8;  // threads of a block: neurons, and shares of the tokens
constexpr int kAhead = 4;               // tokens of a thread under way at once

// A thread takes every kDown-th token of one neuron; runs of kRun in fp32, then fp64.
template <Act act, class T>
__global__ void __launch_bounds__(kAcross* kDown) moments_kernel(const Moments p) {
  __shared__ double part[3][kDown][kAcross];
  const int x = threadIdx.x % kAcross, y = threadIdx.x / kAcross;
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kAcross + x;
  double total[3] = {};
  for (int64_t t0 = y; j < p.F && t0 < p.T; t0 += kRun * kDown) {
    float run[3] = {};
    for (int k = 0; k < kRun; k += kAhead) {
      float w[kAhead], g[kAhead] = {}, u[kAhead] = {};
#pragma unroll
      for (int q = 0; q < kAhead; ++q) {
        const int64_t t = t0 + static_cast<int64_t>(k + q) * kDown;
        w[q] = t >= p.T ? 0.f : p.weights ? p.weights[t] : 1.f;
        if (w[q] != 0) {
          g[q] = load_float(static_cast<const T*>(p.gate) + t * p.F + j);
          u[q] = load_float(static_cast<const T*>(p.up) + t * p.F + j);
        }
      }
#pragma unroll
      for (int q = 0; q < kAhead; ++q) {
        const float2 bent = bend<act>(g[q]);
        const float a = bent.x * u[q], slope = bent.y * u[q];
        run[0] = fmaf(w[q] * a, a, run[0]);
        run[1] = fmaf(w[q] * bent.x, bent.x, run[1]);
        run[2] = fmaf(w[q] * slope, slope, run[2]);
      }
    }
    for (int k = 0; k < 3; ++k) total[k] += run[k];
  }
  for (int k = 0; k < 3; ++k) part[k][y][x] = total[k];
  __syncthreads();
  if (y >= 3 || j >= p.F) return;
  double sum = part[y][0][x];
  for (int q = 1; q < kDown; ++q) sum += part[y][q][x];  // fixed order: the same bits
  p.s[y * p.F + j] += sum;
}

// What is pruned from a group of M values, with any one of them taken out and b put in its place:
// without[i] + min(b, last[i]).
template <int M>
struct Group {
  float pruned;               // sum of the `dropped` smallest
  float without[M], last[M];  // of the others: sum of the dropped - 1 smallest; the next one
};

// CPU vectors compare so too, so that NaN goes the same way on both.
__device__ inline float lower(float a, float b) { return a < b ? a : b; }

__device__ inline float higher(float a, float b) { return a > b ? a : b; }

template <int M>
__device__ inline Group<M> judge(const float (&x)[M], int dropped) {
  float sorted[M];
#pragma unroll
  for (int i = 0; i < M; ++i) sorted[i] = x[i];
#pragma unroll
  for (int i = 0; i + 1 < M; ++i)
#pragma unroll
    for (int k = 0; k + 1 < M - i; ++k) {
      const float low = lower(sorted[k], sorted[k + 1]), high = higher(sorted[k], sorted[k + 1]);
      sorted[k] = low, sorted[k + 1] = high;
    }
  Group<M> out;
  out.pruned = sorted[0];
  float worst = sorted[0], next = sorted[1];
#pragma unroll
  for (int k = 1; k < M; ++k) {  // no indexing by `dropped`: sorted stays in registers
    if (k < dropped) out.pruned += sorted[k], worst = sorted[k];
    if (k == dropped) next = sorted[k];
  }
#pragma unroll
  for (int i = 0; i < M; ++i) {
    const bool in = x[i] <= worst;
    out.without[i] = out.pruned - (in ? x[i] : worst);
    out.last[i] = in ? next : worst;
  }
  return out;
}

// A block is a pair of groups, a warp of it one neuron of the first group that may leave, a lane
// every 32nd feature: kFold, the order of the CPU's sums.
template <int M>
__global__ void __launch_bounds__(32 * M) balance_kernel(const Balance p, int64_t round) {
  const Pair pair = pair_of(p.groups, round, blockIdx.x);
  if (pair.b >= p.groups) return;
  __shared__ float mass[M * M + 1];
  const int lane = threadIdx.x % 32, leaves = threadIdx.x / 32;
  int64_t *a = p.order + pair.a * M, *b = p.order + pair.b * M;
  const float *from_a[M], *from_b[M];
#pragma unroll
  for (int i = 0; i < M; ++i) {
    from_a[i] = p.scores + a[i] * p.features;
    from_b[i] = p.scores + b[i] * p.features;
  }
  float now = 0, then[M] = {};
  for (int64_t f = lane; f < p.features; f += kFold) {
    float x[M], y[M];
#pragma unroll
    for (int i = 0; i < M; ++i) x[i] = from_a[i][f], y[i] = from_b[i][f];
    const Group<M> left = judge(x, M - p.n), right = judge(y, M - p.n);
    now += left.pruned + right.pruned;
    float without = 0, last = 0, leaving = 0;
#pragma unroll
    for (int i = 0; i < M; ++i)
      if (i == leaves) without = left.without[i], last = left.last[i], leaving = x[i];
#pragma unroll
    for (int k = 0; k < M; ++k)
      then[k] += (without + lower(y[k], last)) + (right.without[k] + lower(leaving, right.last[k]));
  }
  now = cuda::warp_sum(now);
#pragma unroll
  for (int k = 0; k < M; ++k) {
    const float sum = cuda::warp_sum(then[k]);
    if (lane == 0) mass[leaves * M + k] = sum;
  }
  __syncthreads();  // also: every thread has read a and b
  if (threadIdx.x != 0) return;
  float best = now - now * kGain;
  int place = -1;
  for (int k = 0; k < M * M; ++k)
    if (mass[k] < best) best = mass[k], place = k;
  if (place < 0) return;
  const int64_t other = a[place / M];
  a[place / M] = b[place % M];
  b[place % M] = other;
}

template <int M>
void start_balance(const Balance& p, cudaStream_t stream) {
  for (int64_t round = 0; round < p.rounds; ++round)
    launch(balance_kernel<M>, static_cast<unsigned>((p.groups + 1) / 2), 32 * M, 0, stream, p,
           round);
}

template <class T>
void start_moments(const Moments& p, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(ceil_div<int64_t>(p.F, kAcross));
  const auto start = [&](auto kernel) { launch(kernel, blocks, kAcross * kDown, 0, stream, p); };
  switch (p.act) {
    case Act::silu: return start(moments_kernel<Act::silu, T>);
    case Act::gelu: return start(moments_kernel<Act::gelu, T>);
    default: return start(moments_kernel<Act::gelu_tanh, T>);
  }
}

}  // namespace

void score_cuda(const Score& p, int device, Stream stream) {
  const cuda::DeviceGuard guard(device);
  const dim3 grid(grid_of(ceil_div<int64_t>(p.cols, kThreads)), grid_of(p.rows, kMostY));
  dispatch<float, f16, bf16>(p.dtype, "W", [&]<class T>() {
    launch(score_kernel<T>, grid, kThreads, 0, cuda::raw(stream), p);
  });
}

void moments_cuda(const Moments& p, int device, Stream stream) {
  const cuda::DeviceGuard guard(device);
  check(ceil_div<int64_t>(p.F, kAcross) <= INT32_MAX, "gate of ", p.F,
        " neurons exceeds the CUDA grid");
  dispatch<float, f16, bf16>(p.dtype, "gate",
                             [&]<class T>() { start_moments<T>(p, cuda::raw(stream)); });
}

void balance_cuda(const Balance& p, int device, Stream stream) {
  const cuda::DeviceGuard guard(device);
  check((p.groups + 1) / 2 <= INT32_MAX, p.groups, " groups exceed the CUDA grid");
  switch (p.m) {
    case 2: return start_balance<2>(p, cuda::raw(stream));
    case 4: return start_balance<4>(p, cuda::raw(stream));
    default: return start_balance<8>(p, cuda::raw(stream));
  }
}

}  // namespace distaya::dass
