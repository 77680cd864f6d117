#include "dass/dass.h"

#include <cmath>

namespace distaya {
namespace {

using dass::Act;

Act parse_act(const std::string& act) {
  if (act == "silu") return Act::silu;
  if (act == "gelu") return Act::gelu;
  if (act == "gelu_tanh") return Act::gelu_tanh;
  fail("the activation '", act, "' must be silu, gelu or gelu_tanh");
}

// Typed pointer of a float32 vector of n entries, one per `what` of `like`.
const float* vector(const Tensor& t, const char* name, int64_t n, const char* what,
                    const Tensor& like, const char* like_name) {
  const auto [entries] = t.shape<1>(name);
  check(entries == n, name, " has ", entries, " entries but ", like_name, " has ", n, " ", what,
        " (", like, ")");
  t.need_contiguous(name);
  same_device(t, name, like, like_name);
  return t.as<float>(name);
}

// Refuses dtypes other than the three of weights and activations, and wrong alignment.
const void* floats(const Tensor& t, const char* name) {
  t.need_contiguous(name);
  const void* data = nullptr;
  dispatch<float, f16, bf16>(t.dtype, name, [&]<class T>() { data = t.as<T>(name); });
  return data;
}

}  // namespace

void dass_score(const Tensor& W, const Tensor& norms, double power, const Tensor& S) {
  const auto [rows, cols] = W.shape<2>("W");
  check(std::isfinite(power) && power >= 0, "power is ", power,
        " but must be finite and not negative");
  const auto [r, c] = S.shape<2>("S");
  check(r == rows && c == cols, "S (", S, ") must have the shape of W (", W, ")");
  S.need_contiguous("S");
  same_device(S, "S", W, "W");
  const dass::Score p{.W = floats(W, "W"),
                      .dtype = W.dtype,
                      .rows = rows,
                      .cols = cols,
                      .norms = vector(norms, "norms", rows, "rows", W, "W"),
                      .power = power,
                      .S = S.as<float>("S")};
  if (rows == 0 || cols == 0) return;
  if constexpr (has_cuda)
    if (W.on_cuda) return dass::score_cuda(p, W.device, stream_of(W));
  dass::score_cpu(p);
}

void dass_moments(const Tensor& s, const Tensor& gate, const Tensor& up, const std::string& act,
                  const Tensor* weights) {
  const auto [T, F] = gate.shape<2>("gate");
  const auto [t, f] = up.shape<2>("up");
  check(t == T && f == F && up.dtype == gate.dtype, "up (", up,
        ") must have the shape and dtype of gate (", gate, ")");
  same_device(up, "up", gate, "gate");
  const auto [three, n] = s.shape<2>("s");
  check(three == 3 && n == F, "s (", s, ") must be [3, ", F,
        "], three sums for each neuron of gate (", gate, ")");
  s.need_contiguous("s");
  same_device(s, "s", gate, "gate");
  const dass::Moments p{
      .T = T,
      .F = F,
      .dtype = gate.dtype,
      .gate = floats(gate, "gate"),
      .up = floats(up, "up"),
      .weights = weights ? vector(*weights, "weights", T, "tokens", gate, "gate") : nullptr,
      .act = parse_act(act),
      .s = s.as<double>("s")};
  for (int64_t k = 0; p.weights && !gate.on_cuda && k < T; ++k)
    check(p.weights[k] >= 0 && std::isfinite(p.weights[k]), "weights[", k, "] is ", p.weights[k],
          " but must be finite and not negative");
  if (T == 0 || F == 0) return;
  if constexpr (has_cuda)
    if (gate.on_cuda) return dass::moments_cuda(p, gate.device, stream_of(gate));
  dass::moments_cpu(p);
}

void dass_balance(const Tensor& scores, int64_t n, int64_t m, int64_t rounds, const Tensor& order) {
  const auto [items, features] = scores.shape<2>("scores");
  scores.need_contiguous("scores");
  check(m == 2 || m == 4 || m == 8, "groups of ", m, " cannot be balanced, only of 2, 4 or 8");
  check(1 <= n && n < m, "N:M is ", n, ":", m, " but must satisfy 1 <= N < M");
  check(rounds >= 0, "rounds is ", rounds, " but must not be negative");
  const auto [length] = order.shape<1>("order");
  check(length % m == 0 && length <= items, "order has ", length,
        " entries but must have a multiple", " of ", m, " and at most the ", items,
        " rows of scores (", scores, ")");
  order.need_contiguous("order");
  same_device(order, "order", scores, "scores");
  const dass::Balance p{.scores = scores.as<float>("scores"),
                        .items = items,
                        .features = features,
                        .n = static_cast<int>(n),
                        .m = static_cast<int>(m),
                        .groups = length / m,
                        .rounds = rounds,
                        .order = order.as<int64_t>("order")};
  for (int64_t k = 0; !scores.on_cuda && k < length; ++k)
    check(p.order[k] >= 0 && p.order[k] < items, "order[", k, "] is ", p.order[k],
          " but scores has ", items, " rows");
  if (p.groups < 2 || features == 0 || rounds == 0) return;
  if constexpr (has_cuda)
    if (scores.on_cuda) return dass::balance_cuda(p, scores.device, stream_of(scores));
  dass::balance_cpu(p);
}

}  // namespace distaya
