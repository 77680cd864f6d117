#include "hessian/tokens.h"

#include <algorithm>
#include <numeric>

#include "hessian/hessian.h"

namespace distaya::cpu {
namespace {

// With fewer tokens per weight than this on average, promoting each short run costs more than
// giving up the bf16 dot product.
constexpr size_t kGroup = 32;

}  // namespace

Plan::Plan(const float* weights, int64_t T) {
  if (!weights) {
    token_.resize(static_cast<size_t>(T));
    std::iota(token_.begin(), token_.end(), int64_t{0});
    cut(nullptr);
    return;
  }
  std::vector<float> values;
  for (int64_t t = 0; t < T; ++t)
    if (weights[t] != 0) token_.push_back(t), values.push_back(weights[t]);
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  if (values.size() > 1 && values.size() * kGroup > token_.size()) {
    weights_ = weights;
    cut(nullptr);
    return;
  }
  std::stable_sort(token_.begin(), token_.end(),
                   [&](int64_t a, int64_t b) { return weights[a] < weights[b]; });
  cut(weights);
}

// Cuts the list into runs of at most kRun tokens and, given weights, of one weight each.
void Plan::cut(const float* weights) {
  const int64_t n = static_cast<int64_t>(token_.size());
  const auto weight = [&](int64_t k) {
    return weights ? weights[token_[static_cast<size_t>(k)]] : 1.0f;
  };
  for (int64_t first = 0, last = 0; first < n; first = last) {
    while (last < n && last - first < kRun && weight(last) == weight(first)) ++last;
    run_.push_back({first, last - first, weight(first)});
  }
}

Tokens Plan::tokens() const {
  return {token_.data(), run_.data(), static_cast<int64_t>(run_.size()), weights_};
}

}  // namespace distaya::cpu
