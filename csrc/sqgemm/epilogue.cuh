// From a sum to an output: bias, activation, rounding.
#pragma once

#include "core/cuda.cuh"
#include "sqgemm/sqgemm.h"

namespace distaya::sqgemm {

struct Output {
  void* y;           // [tokens, rows]
  const void* bias;  // [rows] or null, as up_bias
  const void* up_bias;
  int64_t tokens, rows;
  Activation act;
  bool glu;
};

__device__ inline float activate(Activation act, float x) {
  switch (act) {
    case Activation::silu: return x / (1.f + expf(-x));
    case Activation::gelu: return 0.5f * x * (1.f + erff(x * 0.70710678118654752f));
    case Activation::gelu_tanh:
      return 0.5f * x * (1.f + tanhf(0.79788456080286536f * fmaf(0.044715f * x * x, x, x)));
    default: return x;
  }
}

// act(sum + bias) of a row, of a GLU times (up + up_bias).
template <class T>
__device__ inline float finished(const Output& out, int64_t row, float sum, float up) {
  if (out.bias) sum += cuda::load_float(static_cast<const T*>(out.bias) + row);
  const float y = activate(out.act, sum);
  if (!out.glu) return y;
  if (out.up_bias) up += cuda::load_float(static_cast<const T*>(out.up_bias) + row);
  return y * up;
}

template <class T>
__device__ inline void finish(const Output& out, int64_t token, int64_t row, float sum, float up) {
  cuda::store_float(static_cast<T*>(out.y) + token * out.rows + row,
                    finished<T>(out, row, sum, up));
}

// Rows row and row + 1, row even; the second need not exist. One store where y allows it.
template <class T>
__device__ inline void finish_two(const Output& out, int64_t token, int64_t row, float2 sum,
                                  float2 up) {
  struct alignas(2 * sizeof(T)) Two {
    T value[2];
  };

  T* y = static_cast<T*>(out.y) + token * out.rows + row;
  Two two;
  cuda::store_float(&two.value[0], finished<T>(out, row, sum.x, up.x));
  if (row + 1 < out.rows) cuda::store_float(&two.value[1], finished<T>(out, row + 1, sum.y, up.y));
  if (out.rows % 2 == 0 && reinterpret_cast<uintptr_t>(out.y) % sizeof(Two) == 0) {
    *reinterpret_cast<Two*>(y) = two;
  } else {
    y[0] = two.value[0];
    if (row + 1 < out.rows) y[1] = two.value[1];
  }
}

}  // namespace distaya::sqgemm
