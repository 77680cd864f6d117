// How far two hidden states of the same tokens lie apart, and how far what the head makes of them:
// what decides which layers a model can do without.
//
// similarity: per token 1 - cos(x, y), angle(x, y) / pi and |y - x| / |x| (Men et al. 2024,
// "ShortGPT"; Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers"). From
// the unit vectors x' and y', so that nearly equal ones keep their digits (Kahan):
//
//   1 - cos = |x' - y'|^2 / 2        angle = 2 atan2(|x' - y'|, |x' + y'|)
//
// Sums are fp64 over operands that are not rounded: with u = 2^-24 the results are off by 1.01 u
// relative (the rounding to fp32), and beyond that by 1e-15 sqrt(hidden) in |x' - y'|. Rows:
//   both zero 0, 0, 0      x alone zero 1, 1/2, Inf      y alone zero 1, 1/2, 1
//   a NaN or Inf in either: NaN, NaN, NaN
//
// divergence: logits z = scale (W h + bias), then cap tanh(z / cap) if there is a cap, for the h of
// P and the same h of each Q; p and q are their softmax. Per token KL(p || q), -log p(target),
// -log q(target) in nats and whether the first choices agree (the lower index of equal logits).
// Logits exist for a block of the vocabulary at a time, and p's serve every Q. Carried from block
// to block (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"):
//
//   m = max z,  s = sum e^(z - m)  of p and of q,  a = sum e^(z_p - m_p) (z_p - z_q)
//   KL = a / s_p - lse_p + lse_q,  lse = m + log s
//
// s and a are multiplied by e^(old m - new m) when m grows. KL is not below zero in exact numbers:
// what rounding leaves below is set to 0. A vocabulary entry whose logit is -Inf (a bias of -Inf,
// without cap) has probability 0 and adds nothing to KL. A token whose h of p holds a NaN gets NaN
// everywhere but for q's own -log; NaN in q: everywhere but for p's; no other token sees it. A
// target outside of the vocabulary (CUDA, where it is not looked for): -log is NaN.
//
// Rounding. Let n be the terms' worth of u that a product loses (core/gemm.h: at most 384 + hidden
// / 384 and hidden, as by pairs of bf16, where products below 2^-126 count as 0; core/gemm.cuh:
// hidden / 16 + 48, and less in 16 bits). A logit is off by
//
//   e_v <= |scale| (n + 4) u (sum_j |h_j| |W_vj| + |bias_v|) + 8 u cap
//
// e^x is off by 4 u, and by u |x| since x = z - m is rounded; E_p[m - z] is at most the entropy of
// p. s and a are fp64 sums. With e the largest e_v of both, V the vocabulary, d = z_p - z_q, E the
// mean over p and D = E|log(p / q) - KL|
//
//   |error of lse|  <= e + (5 + ln V) u
//   |error of -log| <= 2 e + (5 + ln V) u + u |-log|
//   |error of KL|   <= e (sum |p - q| + D) + 6 e^2 (1 + D)                       if e <= 1 / 8
//                      + u (2 (5 + ln V) + E[(5 + m - z_p) |d - E d|] + 2 E|d| + KL)
//
// whose first line, from the logits, is small where p is close to q. First choices can differ from
// exact ones only where two logits lie within 2 e of each other.
//
// Scratch is bounded: kColumns rows of W and kRowsCpu or kRowsCuda of P and Q in fp32 at a time,
// whatever the vocabulary. On the CPU results do not depend on how tokens and Qs are grouped; on
// CUDA the shapes choose the product's tile, and with it the last bits.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <optional>

#include "core/tensor.h"

namespace distaya {

struct Similarity {
  int64_t tokens, hidden;
  const void *X, *Y;  // [tokens, hidden]
  Dtype dtype;        // of both: f32, f16 or bf16
  float* out;         // [tokens, 3]
  int device;         // CUDA ordinal
};

struct Divergence {
  int64_t variants, tokens, hidden, vocabulary;
  const void* P;  // [tokens, hidden]
  const void* Q;  // [variants, tokens, hidden]
  const void* W;  // [vocabulary, hidden]
  Dtype p_dtype, q_dtype, w_dtype;
  const void* bias;  // [vocabulary], null: none
  Dtype bias_dtype;
  const int64_t* targets;  // [tokens]
  float scale, cap;        // cap 0: none
  float* out;              // [variants, tokens, 4]
  void* work;              // divergence_work_cuda() bytes, 256-aligned; not used on the CPU
  int device;
};

inline constexpr int64_t kColumnsCpu = 768, kColumnsCuda = 2048;  // vocabulary at a time
inline constexpr int64_t kRowsCpu = 2048, kRowsCuda = 4096;       // rows of P and Q at a time

// How many Qs and how many tokens are worked on together: (1 + variants) tokens <= most.
struct Run {
  int64_t variants, tokens;

  DISTAYA_HD int64_t rows() const { return (1 + variants) * tokens; }
};

inline Run run_of(int64_t variants, int64_t tokens, int64_t most) {
  Run run;
  run.variants = variants < most - 1 ? variants : most - 1;
  const int64_t fit = most / (1 + run.variants), runs = (tokens + fit - 1) / fit;
  run.tokens = (tokens + runs - 1) / runs;  // of about one size
  return run;
}

// What is carried of a row from block to block.
struct Side {
  double s;
  float m, target;  // target: its logit, NaN until it has come
  int64_t best;     // the first place of m
};

DISTAYA_HD inline Side fresh_side() { return {0.0, -FLT_MAX, NAN, 0}; }

// lse, and what it is off the target's logit.
DISTAYA_HD inline double lse_of(const Side& x) { return static_cast<double>(x.m) + log(x.s); }

DISTAYA_HD inline void conclude(const Side& p, const Side& q, double a, float* out) {
  const double lse_p = lse_of(p), lse_q = lse_of(q), kl = a / p.s - lse_p + lse_q;
  out[0] = kl < 0 ? 0.0f : static_cast<float>(kl);  // NaN is not below 0
  out[1] = static_cast<float>(lse_p - static_cast<double>(p.target));
  out[2] = static_cast<float>(lse_q - static_cast<double>(q.target));
  out[3] = p.s + q.s >= 0 ? (p.best == q.best ? 1.0f : 0.0f) : NAN;
}

// A row of `similarity` from |x|^2, |y|^2, |y - x|^2 and then |x' - y'|^2, |x' + y'|^2.
DISTAYA_HD inline void compare(double xx, double yy, double moved, double apart, double along,
                               float* out) {
  const bool finite = xx <= DBL_MAX && yy <= DBL_MAX;
  if (!finite) {
    out[0] = out[1] = out[2] = NAN;
  } else if (xx == 0 || yy == 0) {
    const bool same = xx == yy;
    out[0] = same ? 0.0f : 1.0f;
    out[1] = same ? 0.0f : 0.5f;
    out[2] = same ? 0.0f : xx == 0 ? INFINITY : 1.0f;
  } else {
    out[0] = static_cast<float>(apart / 2);
    out[1] = static_cast<float>(2 / 3.14159265358979323846 * atan2(sqrt(apart), sqrt(along)));
    out[2] = static_cast<float>(sqrt(moved / xx));
  }
}

void similarity_cpu(const Similarity& p);
void similarity_cuda(const Similarity& p, Stream stream);

void divergence_cpu(const Divergence& p);
void divergence_cuda(const Divergence& p, Stream stream);
int64_t divergence_work_cuda(int64_t variants, int64_t tokens, int64_t hidden);

// The doors (influence.cpp): checks, then one of the above.

void similarity(const Tensor& X, const Tensor& Y, const Tensor& out);

void divergence(const Tensor& P, const Tensor& Q, const Tensor& W,
                const std::optional<Tensor>& bias, const Tensor& targets, double scale,
                std::optional<double> cap, const Tensor& out, const Tensor& work);

// Bytes of `work` that Q [variants, tokens, hidden] needs: 0 on the CPU.
int64_t divergence_work(const Tensor& Q);

}  // namespace distaya
