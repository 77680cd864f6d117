#include "sqgemm/sqgemm.h"

#include <string_view>

namespace distaya {
namespace {

using pack::Format;
using sqgemm::Activation, sqgemm::Problem;
using MaybeTensor = std::optional<Tensor>;

const uint8_t* weights_of(const Format& f, const Tensor& data, const char* name, const Tensor& x) {
  same_device(data, name, x, "x");
  return pack::buffer_of(f, data, name);
}

const void* bias_of(const MaybeTensor& bias, const char* name, const Format& f, const Tensor& x) {
  if (!bias) return nullptr;
  const auto [n] = bias->shape<1>(name);
  check(n == f.rows, name, " has ", n, " entries but the weight has ", f.rows, " rows");
  bias->need_contiguous(name);
  same_device(*bias, name, x, "x");
  check(bias->dtype == x.dtype, name, " (", *bias, ") must have the dtype of x (", x, ")");
  return bias->data;
}

int64_t tokens_of(const Tensor& x, const Format& f, const char* name, int64_t last) {
  check(x.ndim >= 1, name, " must have at least 1 dimension but is ", x);
  check(x.sizes[x.ndim - 1] == last, name, " (", x, ") must have ", last,
        " columns, as the weight of ", f.rows, "x", f.cols, " asks");
  int64_t tokens = 1;
  for (int i = 0; i + 1 < x.ndim; ++i) tokens *= x.sizes[i];
  return tokens;
}

// The warpgroup kernels are code for sm_90a alone; a build for plain 90 has nothing in them.
constexpr bool has_wgmma_code =
    std::string_view(DISTAYA_CUDA_ARCHS).find("90a") != std::string_view::npos;

bool wgmma_for(const Format& f, int64_t tokens, const Tensor& x) {
  if constexpr (has_cuda && has_wgmma_code)
    return x.on_cuda && sqgemm::wgmma_serves(f, tokens, x.dtype) && sqgemm::wgmma_device(x.device);
  return false;
}

// What both doors check: x, y and the workspace.
Problem problem_of(const Tensor& x, const std::vector<int64_t>& spec, bool exact, bool glu,
                   bool wgmma, const MaybeTensor& work, const Tensor& y) {
  const Format f = pack::read_spec(spec);
  Problem p{};
  p.format = f;
  p.device = x.device;
  p.tokens = tokens_of(x, f, "x", f.cols);
  x.need_contiguous("x");
  dispatch<float, f16, bf16>(x.dtype, "x", [&]<class T>() { p.x = x.as<T>("x"); });
  check(tokens_of(y, f, "y", f.rows) == p.tokens, "y (", y, ") and x (", x,
        ") differ in their tokens");
  y.need_contiguous("y");
  same_device(y, "y", x, "x");
  check(y.dtype == x.dtype, "y (", y, ") must have the dtype of x (", x, ")");
  p.dtype = x.dtype;
  p.y = y.data;
  p.exact = exact;
  p.wgmma = wgmma && wgmma_for(f, p.tokens, x);
  const int64_t wanted = sqgemm::work_bytes(x, spec, glu, wgmma);
  if (wanted == 0) return p;
  check(work.has_value(), "x (", x, ") needs a workspace of ", wanted, " bytes");
  const auto [bytes] = work->shape<1>("work");
  check(bytes >= wanted, "work has ", bytes, " bytes but x (", x, ") needs ", wanted);
  work->need_contiguous("work");
  same_device(*work, "work", x, "x");
  p.work = work->as<uint8_t>("work");
  check(reinterpret_cast<uintptr_t>(p.work) % 16 == 0, "work must begin at a multiple of 16 bytes");
  p.work_bytes = bytes;
  return p;
}

bool declines(const Format& f, int64_t tokens, const Tensor& x) {
  return x.on_cuda && f.cols > 0 && tokens > sqgemm::cuda_most_tokens(f.kind, x.dtype);
}

bool run(const Problem& p, const Tensor& x) {
  if (p.tokens == 0 || p.format.rows == 0) return true;
  if constexpr (has_cuda)
    if (p.wgmma) return sqgemm::run_wgmma(p, stream_of(x)), true;
  if (declines(p.format, p.tokens, x)) return false;
  if constexpr (has_cuda)
    if (x.on_cuda) return sqgemm::run_cuda(p, stream_of(x)), true;
  return sqgemm::run_cpu(p), true;
}

Activation parse_act(const std::string& act) {
  if (act == "silu") return Activation::silu;
  if (act == "gelu") return Activation::gelu;
  if (act == "gelu_tanh") return Activation::gelu_tanh;
  fail("act is '", act, "' but must be silu, gelu or gelu_tanh");
}

}  // namespace

bool sqgemm::has_wgmma(const Tensor& x, const std::vector<int64_t>& spec) {
  const Format f = pack::read_spec(spec);
  return wgmma_for(f, tokens_of(x, f, "x", f.cols), x);
}

int64_t sqgemm::work_bytes(const Tensor& x, const std::vector<int64_t>& spec, bool glu,
                           bool wgmma) {
  const Format f = pack::read_spec(spec);
  const int64_t tokens = tokens_of(x, f, "x", f.cols);
  if constexpr (has_cuda)
    if (wgmma && wgmma_for(f, tokens, x)) return wgmma_work_bytes(f, tokens, glu);
  if (declines(f, tokens, x)) return 0;
  if constexpr (has_cuda)
    if (x.on_cuda) return cuda_work_bytes(f, tokens, x.dtype, glu);
  return 0;
}

bool sqgemm_linear(const Tensor& x, const Tensor& data, const std::vector<int64_t>& spec,
                   const MaybeTensor& bias, bool exact, bool wgmma, const MaybeTensor& work,
                   const Tensor& y) {
  Problem p = problem_of(x, spec, exact, false, wgmma, work, y);
  p.weights = weights_of(p.format, data, "data", x);
  p.bias = bias_of(bias, "bias", p.format, x);
  return run(p, x);
}

bool sqgemm_glu(const Tensor& x, const Tensor& gate, const Tensor& up,
                const std::vector<int64_t>& spec, const std::string& act,
                const MaybeTensor& bias_gate, const MaybeTensor& bias_up, bool exact, bool wgmma,
                const MaybeTensor& work, const Tensor& y) {
  Problem p = problem_of(x, spec, exact, true, wgmma, work, y);
  p.act = parse_act(act);
  p.weights = weights_of(p.format, gate, "gate", x);
  p.up = weights_of(p.format, up, "up", x);
  p.bias = bias_of(bias_gate, "bias_gate", p.format, x);
  p.up_bias = bias_of(bias_up, "bias_up", p.format, x);
  return run(p, x);
}

}  // namespace distaya
