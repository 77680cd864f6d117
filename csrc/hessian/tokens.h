// Which tokens enter a weighted sum on the CPU, in which order, and where the sum is promoted.
#pragma once

#include <cstdint>
#include <vector>

namespace distaya::cpu {

// Consecutive entries of a token list that are summed in registers and promoted as weight * sum.
struct Run {
  int64_t first, count;
  float weight;
};

struct Tokens {
  const int64_t* token;  // [sum of the runs' counts]
  const Run* run;
  int64_t runs;
  const float* weights;  // [T], to enter the products; null: the runs carry the weights
};

// Tokens of weight 0 are left out. Where weights repeat (languages), equal ones are brought
// together so that a run has one weight and 16-bit inputs enter the products as they are; where
// nearly every weight is its own, tokens keep their order and the kernel weights them in fp32.
class Plan {
 public:
  Plan(const float* weights, int64_t T);  // weights [T], finite and >= 0, or null for all 1

  Tokens tokens() const;

 private:
  void cut(const float* weights);

  std::vector<int64_t> token_;
  std::vector<Run> run_;
  const float* weights_ = nullptr;
};

}  // namespace distaya::cpu
