// The doors: shapes -> checks -> struct -> CPU or CUDA.
#include "influence/influence.h"

namespace distaya {
namespace {

// Data of a contiguous tensor of one of the three floats, on the device of `like`.
void* floats(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  t.need_contiguous(name);
  same_device(t, name, like, like_name);
  void* data = nullptr;
  dispatch<float, bf16, f16>(t.dtype, name, [&]<class T>() { data = t.as<T>(name); });
  return data;
}

// Data of `out` or `work`.
template <class T, int N>
T* place(const Tensor& t, const char* name, const std::array<int64_t, N>& wanted,
         const Tensor& like, const char* like_name) {
  const auto shape = t.shape<N>(name);
  check(shape == wanted, name, " (", t, ") does not fit ", like_name, " (", like, ")");
  t.need_contiguous(name);
  same_device(t, name, like, like_name);
  return t.as<T>(name);
}

}  // namespace

void similarity(const Tensor& X, const Tensor& Y, const Tensor& out) {
  const auto [tokens, hidden] = X.shape<2>("X");
  check(Y.shape<2>("Y") == X.shape<2>("X") && Y.dtype == X.dtype, "Y (", Y,
        ") must have the shape and dtype of X (", X, ")");
  const Similarity p{.tokens = tokens,
                     .hidden = hidden,
                     .X = floats(X, "X", X, "X"),
                     .Y = floats(Y, "Y", X, "X"),
                     .dtype = X.dtype,
                     .out = place<float, 2>(out, "out", {tokens, 3}, X, "X"),
                     .device = X.device};
  if (tokens == 0) return;
  if constexpr (has_cuda)
    if (X.on_cuda) return similarity_cuda(p, stream_of(X));
  similarity_cpu(p);
}

void divergence(const Tensor& P, const Tensor& Q, const Tensor& W,
                const std::optional<Tensor>& bias, const Tensor& targets, double scale,
                std::optional<double> cap, const Tensor& out, const Tensor& work) {
  const auto [tokens, hidden] = P.shape<2>("P");
  const auto [variants, t, h] = Q.shape<3>("Q");
  check(t == tokens && h == hidden, "Q (", Q, ") must hold matrices of the shape of P (", P, ")");
  const auto [vocabulary, columns] = W.shape<2>("W");
  check(columns == hidden, "W has ", columns, " columns but P has ", hidden, " (", P, ")");
  check(vocabulary > 0 && hidden > 0, "W (", W, ") has no entries");
  check(targets.ndim == 1 && targets.sizes[0] == tokens, "targets (", targets,
        ") must be one per token of P (", P, ")");
  Divergence p{};
  p.variants = variants, p.tokens = tokens, p.hidden = hidden, p.vocabulary = vocabulary;
  p.P = floats(P, "P", P, "P"), p.p_dtype = P.dtype;
  p.Q = floats(Q, "Q", P, "P"), p.q_dtype = Q.dtype;
  p.W = floats(W, "W", P, "P"), p.w_dtype = W.dtype;
  if (bias) {
    check(bias->ndim == 1 && bias->sizes[0] == vocabulary, "bias (", *bias,
          ") must have one entry per row of W (", W, ")");
    p.bias = floats(*bias, "bias", P, "P"), p.bias_dtype = bias->dtype;
  }
  p.targets = place<int64_t, 1>(targets, "targets", {tokens}, P, "P");
  p.scale = static_cast<float>(scale);
  check(std::isfinite(p.scale), "scale is ", scale, " but must be finite in float32");
  if (cap) {
    p.cap = static_cast<float>(*cap);
    check(p.cap > 0 && std::isfinite(p.cap), "cap is ", *cap,
          " but must be finite and above 0 in float32");
  }
  p.out = place<float, 3>(out, "out", {variants, tokens, 4}, Q, "Q");
  p.work = place<uint8_t, 1>(work, "work", {divergence_work(Q)}, Q, "Q");
  p.device = P.device;
  for (int64_t k = 0; !P.on_cuda && k < tokens; ++k)
    check(p.targets[k] >= 0 && p.targets[k] < vocabulary, "targets[", k, "] is ", p.targets[k],
          " but the vocabulary has ", vocabulary, " entries");
  if (variants == 0 || tokens == 0) return;
  if constexpr (has_cuda)
    if (P.on_cuda) return divergence_cuda(p, stream_of(P));
  divergence_cpu(p);
}

int64_t divergence_work(const Tensor& Q) {
  const auto [variants, tokens, hidden] = Q.shape<3>("Q");
  if constexpr (has_cuda)
    if (Q.on_cuda && variants > 0 && tokens > 0)
      return divergence_work_cuda(variants, tokens, hidden);
  return 0;
}

}  // namespace distaya
