// y = x W^T for a packed W (csrc/pack/layout.h), with a bias, or for a pair of equal matrices
// y = act(x W_gate^T + bias) * (x W_up^T + up_bias), the gated unit (GLU, arXiv 2002.05202) in one
// pass. Per row of W and token, with w = scale (code - zero), group by group of columns:
//   exact   y = sum_groups scale * sum_k x_k (code_k - zero)       fp32 sums of exact differences
//   W4A8    y = sum_groups scale * s_x * (sum_k q_k code_k - zero sum_k q_k)     x_k ~ s_x q_k
// q are int8 activations, symmetric per token and block of min(group or 128, 128) columns; their
// sums are exact integers. CUDA always runs the exact form.
//
// Accuracy, u = 2^-24, g columns in a group (128 when one scale serves the row), K columns:
//   exact   |error| <= (g + K / g + 4) u sum |x_k| |w_k|, plus the rounding of y to its dtype
//   W4A8    at most half an activation step per element more: sum_k |w_k| s_x(k) / 2
//   warpgroups of sm_90a (wgmma_serves)   w is rounded to x's dtype first, as in a dense product of
//           the dequantized W: |error| <= sum_k |x_k| (v |w_k| + z) + (K + 20) u sum |x_k| |w_k|, v
//           = 2^-8 and z = 2^-134 in bf16, 2^-11 and 2^-25 in fp16; then the rounding of y
// provided every sum of x_k (code_k - zero) over a group is inside the range of fp32. bf16 inputs
// enter the products unrounded; the AVX512-BF16 path takes activations and partial sums below
// 2^-126 for 0, at most 2^-126 |scale| (1 + |code - zero|) more per element; CUDA loses 2^-133 of a
// float32 activation, and its tensor cores may cut where a sum would round: twice the bound. NaN
// and Inf in x reach the outputs of their token and no other.
//
// Order. The columns of one sum are added in an order that depends on the sizes and the instruction
// set (or device) only, never on the number of threads.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/tensor.h"
#include "pack/pack.h"

namespace distaya {

namespace sqgemm {

enum class Activation { none, silu, gelu, gelu_tanh };  // gelu: with erf; gelu_tanh: its fit

struct Problem {
  pack::Format format;     // of weights, and of up
  const uint8_t* weights;  // W, or W_gate
  const uint8_t* up;       // W_up of a GLU, else null
  const void* x;           // [tokens, format.cols], contiguous
  Dtype dtype;             // of x, y and the biases: f32, f16 or bf16
  int64_t tokens;
  const void* bias;     // [format.rows] or null; of the gate in a GLU
  const void* up_bias;  // [format.rows] or null
  void* y;              // [tokens, format.rows]
  Activation act;       // none exactly where up is null
  bool exact;           // false: int8 activations (CPU only)
  bool wgmma;           // CUDA: by the warpgroup kernels
  void* work;           // CUDA: cuda_work_bytes() bytes
  int64_t work_bytes;
  int device;  // CUDA ordinal
};

void run_cpu(const Problem& p);
void run_cuda(const Problem& p, Stream stream);
int64_t cuda_work_bytes(const pack::Format& format, int64_t tokens, Dtype dtype, bool glu);

// The warpgroup kernels of sm_90a (wgmma.cuh).
bool wgmma_device(int device);
void run_wgmma(const Problem& p, Stream stream);
int64_t wgmma_work_bytes(const pack::Format& format, int64_t tokens, bool glu);

// The most tokens that run_cuda is meant for (run_wgmma, below, has no such limit); with more, to
// dequantize W and multiply it with the dense product of the framework is faster. Counted for an
// H100, not measured: that way moves b + 2 + 2 bytes a weight (b as packed), about 1.5 ps, and
// multiplies, 0.5 ps for 200 tokens; a pass of 64 tokens here takes about 2400 instructions of a
// warp for 8192 weights, 0.5 ps where three in five cycles issue one, and half as many again where
// records are expanded first: they break even at about 250 and 150 tokens, rounded down to whole
// passes. float32, whose dense product has no tensor cores, always stays.
constexpr int64_t cuda_most_tokens(pack::Kind kind, Dtype dtype) {
  if (dtype == Dtype::f32) return INT64_MAX;
  const bool whole =
      kind == pack::Kind::int4 || kind == pack::Kind::int8 || kind == pack::Kind::int4_24;
  return whole ? 192 : 128;
}

// What the warpgroup kernels multiply, on a device that has them: enough tokens for them (fewer are
// served by the others, exactly), and scales that are exact in x's dtype. Counted, not measured,
// they never cost more than to dequantize W and multiply: their tensor cores are as busy, and W is
// read once (wgmma.cuh).
constexpr int64_t kWgmmaTokens = 64;

constexpr bool wgmma_serves(const pack::Format& f, int64_t tokens, Dtype x) {
  const bool kind = f.kind == pack::Kind::int4 || f.kind == pack::Kind::int4_24;
  return kind && f.scale == x && x != Dtype::f32 && tokens >= kWgmmaTokens && f.cols > 0;
}

// Whether that is so for this x, here.
bool has_wgmma(const Tensor& x, const std::vector<int64_t>& spec);

// Bytes of `work` the doors want for this call: 0 on the CPU, and where they decline it.
int64_t work_bytes(const Tensor& x, const std::vector<int64_t>& spec, bool glu, bool wgmma);

}  // namespace sqgemm

// Doors. x [..., cols], y [..., rows] of one dtype; data, gate, up: uint8 buffers of the format
// that spec says (pack::read_spec); biases [rows] of x's dtype; work: uint8, sqgemm::work_bytes()
// or none where that is 0. All contiguous, on one device. act: silu, gelu or gelu_tanh. wgmma: by
// the warpgroup kernels where has_wgmma(). False: all is well but y was not computed, as x has more
// than cuda_most_tokens() tokens.
bool sqgemm_linear(const Tensor& x, const Tensor& data, const std::vector<int64_t>& spec,
                   const std::optional<Tensor>& bias, bool exact, bool wgmma,
                   const std::optional<Tensor>& work, const Tensor& y);
bool sqgemm_glu(const Tensor& x, const Tensor& gate, const Tensor& up,
                const std::vector<int64_t>& spec, const std::string& act,
                const std::optional<Tensor>& bias_gate, const std::optional<Tensor>& bias_up,
                bool exact, bool wgmma, const std::optional<Tensor>& work, const Tensor& y);

}  // namespace distaya
