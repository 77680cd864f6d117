// Pruning that knows how the matrices of a gated MLP depend on each other (DaSS, arXiv 2405.01943):
// y = down a with a = act(g) * u, g = gate x, u = up x. Masks themselves come from the mask room.
//
//   score    S_ij = |W_ij| * norm_i^power of gate and up, where norm_i belongs to the OUTPUT i
//   moments  what a neuron does, summed over tokens: a^2, act(g)^2, (act'(g) u)^2
//   balance  which neurons share an N:M group of down, so that little is pruned from any of them
//
// Scores are computed in fp64 and rounded once; with power 0, 0.5 or 1 they have the same bits on
// every machine, and so have the masks.
//
// Accuracy of the moments. Terms are formed in fp32 from inputs that are not rounded, summed in
// fp32 over at most kRun tokens and then added to fp64 sums. With u = 2^-24 the activations are
// good to 10 u |g| and their slopes to 24 u (1 + |g|), so for each neuron and call
//   |error of sum w a^2|          <= (2 * 10 + kRun + 8) u   sum w (g up)^2
//   |error of sum w act(g)^2|     <= (2 * 10 + kRun + 8) u   sum w g^2
//   |error of sum w (act'(g) u)^2| <= (3 * 24 + kRun + 8) u  sum w (1 + |g|)^2 up^2
// where |act'| <= 1.13. Tokens are added in an order that depends on T alone (and, on CUDA, the
// block's shape). NaN and infinities come through; a token of weight 0 is left out, whatever it
// holds.
//
// Balance. Neurons are exchanged between pairs of groups. In each round every group has one
// partner, and the pair makes the one exchange that lowers the mass pruned from both most, if any
// lowers it. Masses are fp32 sums over features f in 32 lanes (f mod 32) and a tree over the lanes,
// without a product anywhere: every machine takes the same decisions.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include "core/tensor.h"

namespace distaya::dass {

enum class Act { silu, gelu, gelu_tanh };

struct Score {
  const void* W;  // fp32 | f16 | bf16 [rows, cols]
  Dtype dtype;
  int64_t rows, cols;
  const float* norms;  // [rows]
  double power;
  float* S;  // [rows, cols]
};

// norm^power. sqrt is rounded correctly everywhere; pow may be a bit off, differently per machine.
DISTAYA_HD inline double raised(float norm, double power) {
  const double x = norm;
  return power == 0.5 ? sqrt(x) : power == 1.0 ? x : power == 0.0 ? 1.0 : pow(x, power);
}

inline constexpr int kRun = 64;  // tokens summed in fp32 between two additions to fp64

struct Moments {
  int64_t T, F;           // tokens, neurons
  Dtype dtype;            // of gate and up: f32, f16 or bf16
  const void *gate, *up;  // [T, F], outputs of the two Linears
  const float* weights;   // [T], null: all 1
  Act act;
  double* s;  // [3, F], added to
};

inline constexpr int kFold = 32;  // lanes over which masses are summed
// An exchange must lower a pair's mass by more than this share: beyond what rounding can feign,
// for (features / 32 + 8) 2^-23 stays below it up to 2^16 features.
inline constexpr float kGain = 0x1p-11f;

struct Balance {
  const float* scores;  // [items, features], one row per neuron
  int64_t items, features;
  int n, m;        // 1 <= n < m; m is 2, 4 or 8
  int64_t groups;  // of m neurons
  int64_t rounds;
  int64_t* order;  // [groups * m] distinct rows of scores; neighbours share a group
};

// Partners in a round: of an even number of places, place `last` stands still and the others turn.
struct Pair {
  int64_t a, b;
};

DISTAYA_HD inline Pair pair_of(int64_t groups, int64_t round, int64_t k) {
  const int64_t last = groups + groups % 2 - 1;  // a pair with place `groups` (odd) sits out
  const int64_t turn = round % last;
  if (k == 0) return {turn, last};
  return {(turn + k) % last, (turn + last - k) % last};
}

void score_cpu(const Score& p);
void score_cuda(const Score& p, int device, Stream stream);
void moments_cpu(const Moments& p);
void moments_cuda(const Moments& p, int device, Stream stream);
void balance_cpu(const Balance& p);
void balance_cuda(const Balance& p, int device, Stream stream);

}  // namespace distaya::dass

namespace distaya {

// The doors. act: silu | gelu | gelu_tanh.
void dass_score(const Tensor& W, const Tensor& norms, double power, const Tensor& S);
void dass_moments(const Tensor& s, const Tensor& gate, const Tensor& up, const std::string& act,
                  const Tensor* weights);
void dass_balance(const Tensor& scores, int64_t n, int64_t m, int64_t rounds, const Tensor& order);

}  // namespace distaya
