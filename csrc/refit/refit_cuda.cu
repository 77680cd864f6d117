// Conjugate gradients and ADMM on the device: one product for all rows per iteration (core/gemm)
// and one kernel that takes each row through the rest of it, a thread block per row (refit.h has
// the formulas). Nothing is allocated, copied to the host or waited for.
//
// Counted for 4096 columns: three products in tf32 take 24576 operations per element, at least 50
// ps of an H100's tensor cores; the row's kernel moves 29 bytes of it through memory, 9 ps. What it
// reads again, its own row, comes from the caches.
#include "core/cuda.cuh"
#include "core/gemm.cuh"
#include "refit/refit.h"

namespace distaya {
namespace {

using namespace cuda;

constexpr int kThreads = 256;

// Device scratch, laid out once; every part starts at a multiple of 256 bytes.
struct Work {
  float* damp;                  // [1] what is added to H's diagonal
  float *D, *inverse;           // [cols] diagonal of H', and 1 / D where D > 0
  Search* searches;             // [run]
  float *Q, *residual, *p, *y;  // [run, pitch]
  int64_t pitch;  // cols, so that rows start at multiples of 16 bytes, for the product
  int64_t run;    // rows worked on together
  int64_t bytes;
};

Work lay_out(void* base, int64_t rows, int64_t cols) {
  Work w{};
  Arena arena{base};
  w.pitch = ceil_div<int64_t>(cols, 4) * 4;
  w.run = rows_together(rows, cols, kRefitRunCuda);
  w.damp = arena.take<float>(1);
  w.D = arena.take<float>(cols);
  w.inverse = arena.take<float>(cols);
  w.searches = arena.take<Search>(w.run);
  for (float** array : {&w.Q, &w.residual, &w.p, &w.y}) *array = arena.take<float>(w.run * w.pitch);
  w.bytes = arena.bytes;
  return w;
}

// Sum over the block for every thread: a tree over lanes, then the warps in their order. `part` is
// [warps] of shared memory, free again when this returns.
__device__ double block_sum(float x, double* part) {
  const double of_warp = warp_sum(static_cast<double>(x));
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = of_warp;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kThreads / 32; ++w) sum += part[w];
  __syncthreads();
  return sum;
}

// One block: the diagonal of H'.
__global__ void __launch_bounds__(kThreads) diagonal_kernel(const Refit p, const Work w) {
  __shared__ double part[kThreads / 32];
  double sum = 0;
  for (int64_t j = threadIdx.x; j < p.cols; j += kThreads) sum += p.H[j * (p.cols + 1)];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
  for (int i = 0; i < kThreads / 32; ++i) sum += part[i];
  const double mean = sum / static_cast<double>(p.cols);
  const float damp = static_cast<float>(p.damp * (mean > 0 ? mean : 1.0));
  if (threadIdx.x == 0) *w.damp = damp;
  for (int64_t j = threadIdx.x; j < p.cols; j += kThreads) {
    const float d = p.H[j * (p.cols + 1)] + damp;
    w.D[j] = d;
    w.inverse[j] = d > 0 ? 1 / d : 0;
  }
}

// Q = start on the mask and E = T - Q into p, for rows [first, first + rows).
template <class T>
__global__ void __launch_bounds__(kThreads)
    begin_kernel(const Refit p, const Work w, int64_t first, int64_t rows) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const int64_t from = (first + i) * p.cols, to = i * w.pitch;
    for (int64_t j = threadIdx.x; j < p.cols; j += kThreads) {
      const float t = load_float(static_cast<const T*>(p.target) + from + j);
      const float q = p.mask[from + j] ? (p.start ? p.start[from + j] : t) : 0.f;
      w.Q[to + j] = q;
      w.p[to + j] = t - q;
    }
  }
}

// p = E and y = E H on entry, the first direction on exit.
__global__ void __launch_bounds__(kThreads)
    first_kernel(const Refit p, const Work w, int64_t first, int64_t rows, double unit) {
  __shared__ double part[kThreads / 32];
  const float damp = *w.damp;
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const bool* mask = p.mask + (first + i) * p.cols;
    const int64_t row = i * w.pitch;
    float loss = 0, size = 0, rz = 0;
    for (int64_t j = threadIdx.x; j < p.cols; j += kThreads) {
      const float e = w.p[row + j], q = w.Q[row + j], g = fmaf(damp, e, w.y[row + j]);
      const float r = mask[j] ? g : 0.f, z = r * w.inverse[j];
      loss = fmaf(e, g, loss);
      size = fmaf(w.D[j], fmaf(e, e, q * q), size);
      rz = fmaf(r, z, rz);
      w.residual[row + j] = r;
      w.p[row + j] = z;
    }
    const double before = 0.5 * block_sum(loss, part), sizes = block_sum(size, part);
    Search s;
    begin_search(s, block_sum(rz, part), sizes, unit);
    if (threadIdx.x == 0) {
      p.before[first + i] = p.after[first + i] = before;
      w.searches[i] = s;
    }
    if (s.rz == 0)
      for (int64_t j = threadIdx.x; j < p.cols; j += kThreads) w.p[row + j] = 0;
  }
}

// p y of a row, for y = p H'.
__device__ double curvature(const float* p, const float* y, float damp, int64_t cols,
                            double* part) {
  float sum = 0;
#pragma unroll 4
  for (int64_t j = threadIdx.x; j < cols; j += kThreads)
    sum = fmaf(p[j], fmaf(damp, p[j], y[j]), sum);
  return block_sum(sum, part);
}

// One step, given y = p H, and the next direction.
__global__ void __launch_bounds__(kThreads)
    advance_kernel(const Refit p, const Work w, int64_t first, int64_t rows, double unit) {
  __shared__ double part[kThreads / 32];
  const float damp = *w.damp;
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    Search s = w.searches[i];
    if (s.rz == 0) continue;
    const bool* mask = p.mask + (first + i) * p.cols;
    float *Q = w.Q + i * w.pitch, *residual = w.residual + i * w.pitch;
    float *direction = w.p + i * w.pitch, *y = w.y + i * w.pitch;
    const double length = step_length(s, curvature(direction, y, damp, p.cols, part));
    const double gain = 0.5 * length * s.rz;
    const float a = static_cast<float>(length);
    float beta = 0;
    if (s.rz != 0) {
      float rz = 0;
#pragma unroll 4
      for (int64_t j = threadIdx.x; j < p.cols; j += kThreads) {
        const float x = direction[j], g = fmaf(damp, x, y[j]);
        const float r = mask[j] ? fmaf(-a, g, residual[j]) : 0.f;
        Q[j] = fmaf(a, x, Q[j]);
        residual[j] = r;
        rz = fmaf(r, r * w.inverse[j], rz);
      }
      beta = static_cast<float>(continue_search(s, length, block_sum(rz, part), unit));
    }
    const bool goes_on = s.rz != 0;
#pragma unroll 4
    for (int64_t j = threadIdx.x; j < p.cols; j += kThreads)
      direction[j] = goes_on ? fmaf(beta, direction[j], residual[j] * w.inverse[j]) : 0.f;
    if (threadIdx.x == 0) {
      p.after[first + i] -= gain;
      w.searches[i] = s;
    }
  }
}

// The last step (unless step is false) into the result.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const Refit p, const Work w, int64_t first, int64_t rows, bool step) {
  __shared__ double part[kThreads / 32];
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    Search s = w.searches[i];
    const float *Q = w.Q + i * w.pitch, *direction = w.p + i * w.pitch;
    float a = 0;
    if (step && s.rz != 0) {
      const double py = curvature(direction, w.y + i * w.pitch, *w.damp, p.cols, part);
      const double length = step_length(s, py);
      a = static_cast<float>(length);
      if (threadIdx.x == 0) p.after[first + i] -= 0.5 * length * s.rz;
    }
    T* out = static_cast<T*>(p.out) + (first + i) * p.cols;
    for (int64_t j = threadIdx.x; j < p.cols; j += kThreads)
      store_float(out + j, s.rz == 0 ? Q[j] : fmaf(a, direction[j], Q[j]));
  }
}

// X = Y + rho (D - U), and G keeps U alone.
__global__ void __launch_bounds__(kThreads) mix_kernel(const Admm p) {
  const int64_t size = p.rows * p.cols, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; t < size;
       t += stride) {
    const float g = p.G[t];
    const bool keep = p.mask[t];
    const float U = keep ? 0.f : g * p.ratio;
    p.X[t] = fmaf(p.rho, keep ? g : -U, p.Y[t]);
    p.G[t] = U;
  }
}

__global__ void __launch_bounds__(kThreads) magnitude_kernel(const Admm p) {
  const int64_t size = p.rows * p.cols, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; t < size; t += stride)
    p.X[t] = fabsf(p.G[t]);
}

// C = X B or C += X B for rows at a distance of `pitch`, which are some of all_rows.
void product(int64_t rows, int64_t all_rows, int64_t cols, int64_t pitch, const float* X,
             const float* B, float* C, bool add, cudaStream_t stream) {
  gemm({.m = rows,
        .n = cols,
        .k = cols,
        .alpha = 1.0f,
        .A = X,
        .a_row = pitch,
        .a_col = 1,
        .B = B,
        .b_row = cols,
        .b_col = 1,
        .C = C,
        .ldc = pitch,
        .overwrite = !add,
        .m_all = all_rows},
       stream);
}

void refit_run(const Refit& p, const Work& w, int64_t first, int64_t rows, cudaStream_t s) {
  const double unit = rounding_unit(p.cols);
  const unsigned grid = grid_of(rows);
  const int64_t all = rows_together(p.all_rows, p.cols, kRefitRunCuda);
  dispatch<float, bf16, f16>(p.target_dtype, "target", [&]<class T>() {
    launch(begin_kernel<T>, grid, kThreads, 0, s, p, w, first, rows);
  });
  product(rows, all, p.cols, w.pitch, w.p, p.H, w.y, false, s);
  launch(first_kernel, grid, kThreads, 0, s, p, w, first, rows, unit);
  for (int64_t t = 0; t < p.iterations; ++t) {
    product(rows, all, p.cols, w.pitch, w.p, p.H, w.y, false, s);
    if (t + 1 < p.iterations) launch(advance_kernel, grid, kThreads, 0, s, p, w, first, rows, unit);
  }
  dispatch<float, bf16, f16>(p.dtype, "W", [&]<class T>() {
    launch(finish_kernel<T>, grid, kThreads, 0, s, p, w, first, rows, p.iterations > 0);
  });
}

}  // namespace

int64_t refit_work_cuda(int64_t rows, int64_t cols) { return lay_out(nullptr, rows, cols).bytes; }

void refit_cuda(const Refit& p, Stream stream) {
  const DeviceGuard guard(p.device);
  const cudaStream_t s = raw(stream);
  const Work w = lay_out(p.work, p.rows, p.cols);
  launch(diagonal_kernel, 1, kThreads, 0, s, p, w);
  for (int64_t i = 0; i < p.rows; i += w.run)
    refit_run(p, w, i, p.rows - i < w.run ? p.rows - i : w.run, s);
}

void admm_cuda(const Admm& p, Stream stream) {
  const DeviceGuard guard(p.device);
  const cudaStream_t s = raw(stream);
  const unsigned grid = grid_of(ceil_div<int64_t>(p.rows * p.cols, 4 * kThreads));
  launch(mix_kernel, grid, kThreads, 0, s, p);
  product(p.rows, p.all_rows, p.cols, p.cols, p.X, p.inverse, p.G, true, s);
  launch(magnitude_kernel, grid, kThreads, 0, s, p);
}

void multiply_cuda(const Multiply& p, Stream stream) {
  const DeviceGuard guard(p.device);
  product(p.rows, p.all_rows, p.cols, p.cols, p.X, p.B, p.C, true, raw(stream));
}

}  // namespace distaya
