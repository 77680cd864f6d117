// H += sum_t w_t x_t x_t^T, the second moment of a layer's inputs, from which every later room
// works (SparseGPT, arXiv 2301.00774, section 3.1; GPTQ, arXiv 2210.17323, section 2). A true SYRK:
// only elements H[i, j] with j >= i are computed and written, half of the flops of X^T X.
//
// G += sum_t w_t y_t x_t^T, the cross moment of two inputs, by the same kernels over the whole
// rectangle; y_t and x_t may differ in length. Every product and every sum of G[i, j] is that of
// H[i, j] with y_ti for x_ti, also in its order, whatever other columns there are, and swapping Y
// and X transposes G to the bit: for Y = X, G is H and its mirror image.
//
// Accuracy. Products are summed in fp32 over a run of at most kRun tokens, and each run is then
// added to H (promotion). With u = 2^-24, T tokens in one call and S = sum_t w_t |x_ti| |x_tj|:
//   |error of H[i, j]| <= (kRun + runs + 6) u (|H_before| + S),  runs <= T / kRun + D + 1
// where D is the number of different weights; as rounding to nearest is fair, the actual error
// grows like the square root of that factor. For G, S = sum_t w_t |y_ti| |x_tj|. Where weights
// differ from token to token, and for float32 on CUDA, both operands are multiplied by sqrt(w_t),
// which keeps the products symmetric; its rounding and theirs are 4 of the 6. bf16 and fp16 inputs
// enter the products unrounded. The AVX512-BF16 path takes inputs below 2^-126 for 0 and flushes
// partial sums below 2^-126 to 0: at most 2^-126 sum_t w_t (1 + |x_ti| + |x_tj|) more. float32
// inputs on CUDA are weighted and summed token by token: runs <= T / kRun + 1.
//
// 16-bit inputs on CUDA go through tensor cores, which multiply exactly but may cut where they
// would round, so twice the bound of an fp32 sum; a run is at most kCudaRun consecutive tokens of
// one weight, those of weight 0 left out, and its promotion weight * sum + H is rounded once:
//   |error of H[i, j]| <= (2 kCudaRun + runs + 4) u (|H_before| + S),  runs <= T / kCudaRun + D + 1
// where D counts the tokens of other weight than the one before, zeros not counted. Every such
// token costs the time of up to kCudaRun more: weights that are constant over sequences cost
// nothing, those that differ from token to token up to kCudaRun times the time of equal ones.
//
// Order. The tokens of one sum are added in an order that depends on T, the weights and the
// instruction set (or device) only, never on the number of threads.
#pragma once

#include <cstdint>
#include <optional>

#include "core/tensor.h"

namespace distaya {

inline constexpr int64_t kRun = 256;  // tokens summed in registers between two promotions
inline constexpr int kCudaRun = 32;   // the same for 16-bit X on CUDA

struct Hessian {
  int64_t T, K, C;       // tokens, columns of Y, columns of X; K is C without Y
  Dtype dtype;           // of X and Y: f32, f16 or bf16
  const void* X;         // [T, C]
  const void* Y;         // [T, K] whose columns are the rows of a cross moment. Null: X, for H
  const float* weights;  // [T], finite, >= 0; a token of weight 0 is not read. Null: all 1
  float* H;              // [K, C]; upper triangle, whole with Y
  int device;            // CUDA ordinal
};

struct ColumnSq {  // the diagonal of the same sum, at the cost of reading X once
  int64_t T, C;
  Dtype dtype;
  const void* X;
  const float* weights;
  float* s;  // [C]
  int device;
};

struct Symmetrize {
  int64_t C;
  float* H;  // [C, C]
  int device;
};

// Doors: X [T, C], Y [T, K], weights [T] or none, H [C, C], G [K, C], s [C]; all on one device.
void hessian(const Tensor& H, const Tensor& X, const std::optional<Tensor>& weights);
void cross(const Tensor& G, const Tensor& Y, const Tensor& X, const std::optional<Tensor>& weights);
void column_sq(const Tensor& s, const Tensor& X, const std::optional<Tensor>& weights);
void symmetrize(const Tensor& H);  // H[j, i] = H[i, j] for j > i

void hessian_cpu(const Hessian& p);
void column_sq_cpu(const ColumnSq& p);
void symmetrize_cpu(const Symmetrize& p);

void hessian_cuda(const Hessian& p, Stream stream);
void column_sq_cuda(const ColumnSq& p, Stream stream);
void symmetrize_cuda(const Symmetrize& p, Stream stream);

}  // namespace distaya
