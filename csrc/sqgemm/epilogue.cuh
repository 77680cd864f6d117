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

// y[token, row] = act(sum + bias), of a GLU times (up + up_bias).
template <class T>
__device__ void finish(const Output& out, int64_t token, int64_t row, float sum, float up) {
  if (out.bias) sum += cuda::load_float(static_cast<const T*>(out.bias) + row);
  float y = activate(out.act, sum);
  if (out.glu) {
    if (out.up_bias) up += cuda::load_float(static_cast<const T*>(out.up_bias) + row);
    y *= up;
  }
  cuda::store_float(static_cast<T*>(out.y) + token * out.rows + row, y);
}

}  // namespace distaya::sqgemm
