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

// What H and G have in common: X's side of the sum, called `name`.
Hessian checked(const Tensor& sum, const char* name, const Tensor& X,
                const std::optional<Tensor>& weights) {
  const auto [T, C] = X.shape<2>("X");
  sum.need_contiguous(name);
  same_device(sum, name, X, "X");
  return {.T = T,
          .K = C,
          .C = C,
          .dtype = X.dtype,
          .X = checked(X),
          .Y = nullptr,
          .weights = checked(weights, X, T),
          .H = sum.as<float>(name),
          .device = X.device};
}

void add(const Hessian& p, const Tensor& X) {
  if (p.T == 0 || p.K == 0 || p.C == 0) return;
  if constexpr (has_cuda)
    if (X.on_cuda) return hessian_cuda(p, stream_of(X));
  hessian_cpu(p);
}

}  // namespace

void hessian(const Tensor& H, const Tensor& X, const std::optional<Tensor>& weights) {
  const Hessian p = checked(H, "H", X, weights);
  const auto [rows, cols] = H.shape<2>("H");
  check(rows == p.C && cols == p.C, "H is ", rows, "x", cols, " but X has ", p.C,
        " columns, so H must be ", p.C, "x", p.C);
  add(p, X);
}

void cross(const Tensor& G, const Tensor& Y, const Tensor& X,
           const std::optional<Tensor>& weights) {
  Hessian p = checked(G, "G", X, weights);
  const auto [tokens, columns] = Y.shape<2>("Y");
  check(tokens == p.T, "Y has ", tokens, " tokens but X has ", p.T);
  check(Y.dtype == X.dtype, "Y (", Y, ") and X (", X, ") must have the same dtype");
  same_device(Y, "Y", X, "X");
  const auto [rows, cols] = G.shape<2>("G");
  check(rows == columns && cols == p.C, "G is ", rows, "x", cols, " but Y has ", columns,
        " columns and X has ", p.C, ", so G must be ", columns, "x", p.C);
  p.K = columns, p.Y = checked(Y, "Y");
  add(p, X);
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
