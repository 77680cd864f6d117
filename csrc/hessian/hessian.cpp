#include "hessian/hessian.h"

#include <cmath>

namespace distaya {
namespace {

// The weights' pointer after its checks; null without weights. Values are checked on the CPU only:
// on CUDA that would stop the stream, so there they are the caller's duty (ops/hessian.py).
const float* checked(const std::optional<Tensor>& weights, const Tensor& X, int64_t T) {
  if (!weights) return nullptr;
  const auto [n] = weights->shape<1>("weights");
  check(n == T, "weights has ", n, " entries but X has ", T, " tokens");
  weights->need_contiguous("weights");
  same_device(*weights, "weights", X, "X");
  const float* w = weights->as<float>("weights");
  for (int64_t t = 0; !X.on_cuda && t < T; ++t)
    check(w[t] >= 0 && std::isfinite(w[t]), "weights[", t, "] is ", w[t],
          " but must be finite and not negative");
  return w;
}

// The typed pointer of X (or Y) as void*; refuses other dtypes.
const void* checked(const Tensor& X, const char* name = "X") {
  X.need_contiguous(name);
  const void* data = nullptr;
  dispatch<float, f16, bf16>(X.dtype, name, [&]<class T>() { data = X.as<T>(name); });
  return data;
}

// The square sum over X's tokens, called `name`, and the operands' places.
Hessian checked(const Tensor& H, const char* name, const Tensor* Y, const Tensor& X,
                const std::optional<Tensor>& weights) {
  const auto [T, C] = X.shape<2>("X");
  const auto [rows, cols] = H.shape<2>(name);
  check(rows == C && cols == C, name, " is ", rows, "x", cols, " but X has ", C, " columns, so ",
        name, " must be ", C, "x", C);
  H.need_contiguous(name);
  same_device(H, name, X, "X");
  if (Y) {
    const auto [tokens, columns] = Y->shape<2>("Y");
    check(tokens == T && columns == C, "Y is ", tokens, "x", columns, " but X is ", T, "x", C);
    check(Y->dtype == X.dtype, "Y (", *Y, ") and X (", X, ") must have the same dtype");
    same_device(*Y, "Y", X, "X");
  }
  return {.T = T,
          .C = C,
          .dtype = X.dtype,
          .X = checked(X),
          .Y = Y ? checked(*Y, "Y") : nullptr,
          .weights = checked(weights, X, T),
          .H = H.as<float>(name),
          .device = X.device};
}

void add(const Hessian& p, const Tensor& X) {
  if (p.T == 0 || p.C == 0) return;
  if constexpr (has_cuda)
    if (X.on_cuda) return hessian_cuda(p, stream_of(X));
  hessian_cpu(p);
}

}  // namespace

void hessian(const Tensor& H, const Tensor& X, const std::optional<Tensor>& weights) {
  add(checked(H, "H", nullptr, X, weights), X);
}

void cross(const Tensor& G, const Tensor& Y, const Tensor& X,
           const std::optional<Tensor>& weights) {
  add(checked(G, "G", &Y, X, weights), X);
}

void column_sq(const Tensor& s, const Tensor& X, const std::optional<Tensor>& weights) {
  const auto [T, C] = X.shape<2>("X");
  const auto [n] = s.shape<1>("s");
  check(n == C, "s has ", n, " entries but X has ", C, " columns");
  s.need_contiguous("s");
  same_device(s, "s", X, "X");
  const ColumnSq p{.T = T,
                   .C = C,
                   .dtype = X.dtype,
                   .X = checked(X),
                   .weights = checked(weights, X, T),
                   .s = s.as<float>("s"),
                   .device = X.device};
  if (T == 0 || C == 0) return;
  if constexpr (has_cuda)
    if (X.on_cuda) return column_sq_cuda(p, stream_of(X));
  column_sq_cpu(p);
}

void symmetrize(const Tensor& H) {
  const auto [rows, cols] = H.shape<2>("H");
  check(rows == cols, "H must be square but is ", rows, "x", cols);
  H.need_contiguous("H");
  const Symmetrize p{.C = rows, .H = H.as<float>("H"), .device = H.device};
  if (rows == 0) return;
  if constexpr (has_cuda)
    if (H.on_cuda) return symmetrize_cuda(p, stream_of(H));
  symmetrize_cpu(p);
}

}  // namespace distaya
