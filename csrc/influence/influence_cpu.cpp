// Rows compared in fp64, and the head as one product per block of the vocabulary for all rows of P
// and Q, whose logits are summed up while they are in the caches (influence.h has the formulas).
#include "core/gemm.h"
#include "influence/influence.h"

#define DISTAYA_ISA_FILE "influence/influence_cpu.cpp"
#include "core/foreach_isa.h"

#ifdef DISTAYA_ISA_PASS
#include "core/activation.h"
#include "core/microkernel.h"
#include "core/pack.h"
#include "influence/pairs.h"
#include "influence/rows.h"

namespace distaya::DISTAYA_ISA {
namespace {

static_assert(kColumnsCpu % kNR == 0);

constexpr int64_t kTask = 16;  // rows per task

template <class Body>
void for_rows(int64_t rows, const Body& body) {
  cpu::parallel_for((rows + kTask - 1) / kTask, [&](int64_t task) {
    for (int64_t i = task * kTask; i < std::min(rows, (task + 1) * kTask); ++i) body(i);
  });
}

// Consecutive elements of any of the three floats as fp32.
template <class T>
void widen(const T* from, int64_t n, float* to) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(to + j, load(from + j));
  for (; j < n; ++j) to[j] = to_float(from[j]);
}

// Rows [first, first + rows) of a matrix of `cols` columns.
void widen_rows(const void* from, Dtype dtype, int64_t first, int64_t rows, int64_t cols,
                float* to) {
  dispatch<float, f16, bf16>(dtype, "a matrix", [&]<class T>() {
    for_rows(rows, [&](int64_t i) {
      widen(static_cast<const T*>(from) + (first + i) * cols, cols, to + i * cols);
    });
  });
}

// tanh within 7 u, absolutely.
DISTAYA_INLINE vf tanh(vf x) {
  const vf one = splat(1.0f), size = abs(x);
  const vf y = one - splat(2.0f) / (exp(size + size) + one);
  return select(x < vf{}, -y, y);
}

// A block of the vocabulary.
struct Block {
  int64_t first, n;
  const float* bias;  // [n, rounded up to vectors] or null
  float scale, cap;
};

// Turns products into logits, -Inf beyond the block; their maximum.
float finish_logits(const Block& b, float* z) {
  const int64_t last = (b.n - 1) / kLanes * kLanes;
  vf most = splat(-INFINITY);
  for (int64_t j = 0; j <= last; j += kLanes) {
    vf x = load(z + j);
    if (b.bias) x = x + load(b.bias + j);
    x = x * splat(b.scale);
    if (b.cap > 0) x = splat(b.cap) * tanh(x / splat(b.cap));
    if (j == last)
      for (int64_t k = b.n - j; k < kLanes; ++k) x[k] = -INFINITY;
    store(z + j, x);
    most = max(most, x);
  }
  float best = -INFINITY;
  for (int i = 0; i < kLanes; ++i) best = most[i] > best ? most[i] : best;
  return best;
}

// Takes a block's logits into m, target and best; what the sums so far are to be multiplied by.
double grow(Side& side, const Block& b, int64_t target, const float* z, float most) {
  if (target >= b.first && target < b.first + b.n) side.target = z[target - b.first];
  if (!(most > side.m)) return 1;
  side.best = b.first + (std::find(z, z + b.n, most) - z);
  const double shrink = std::exp(static_cast<double>(side.m) - static_cast<double>(most));
  side.m = most;
  return shrink;
}

// z becomes p's logits and e their powers e^(z - m); what `a` is to be multiplied by.
double add_first(Side& side, const Block& b, int64_t target, float* z, float* e) {
  const double shrink = grow(side, b, target, z, finish_logits(b, z));
  const vf m = splat(side.m);
  vd s{};
  for (int64_t j = 0; j < b.n; j += kLanes) {
    const vf power = exp(load(z + j) - m);
    store(e + j, power);
    s += wide(power);
  }
  side.s = side.s * shrink + sum(s);
  return shrink;
}

// The same of a q; what the block adds to a.
double add_other(Side& side, const Block& b, int64_t target, float* z, const float* z_p,
                 const float* e_p) {
  const double shrink = grow(side, b, target, z, finish_logits(b, z));
  const vf m = splat(side.m);
  vd s{}, a{};
  for (int64_t j = 0; j < b.n; j += kLanes) {
    const vf x = load(z + j), e = load(e_p + j);
    s += wide(exp(x - m));
    a += wide(select(e == vf{}, vf{}, e * (load(z_p + j) - x)));  // -Inf - -Inf does not count
  }
  side.s = side.s * shrink + sum(s);
  return sum(a);
}

// What a run of tokens and Qs needs, kept from run to run.
struct Space {
  bool pairs;                   // h and w hold packed pairs of bf16 (pairs.h), else fp32 rows
  cpu::Scratch<float> h, w;     // rows of P, then those of each Q; rows of W
  cpu::Scratch<float> z, bias;  // [rows, kColumns], [kColumns]
  cpu::Scratch<Side> sides;     // [rows]
  cpu::Scratch<double> a;       // [rows], the first `tokens` of them not used

  Space(const Divergence& p, int64_t rows)
      : pairs(kLanes == 16 && p.p_dtype == Dtype::bf16 && p.q_dtype == Dtype::bf16 &&
              p.w_dtype == Dtype::bf16 && p.hidden % 2 == 0) {
    rows = (rows + kMR - 1) / kMR * kMR;  // tiles are written whole
    const int64_t words = pairs ? slices_of(p.hidden / 2) * kSteps : p.hidden;
    h = cpu::scratch<float>(rows * words);
    w = cpu::scratch<float>(p.w_dtype == Dtype::f32 ? 0 : kColumnsCpu * words);
    z = cpu::scratch<float>(rows * kColumnsCpu);
    bias = cpu::scratch<float>(kColumnsCpu);
    sides = cpu::scratch<Side>(rows);
    a = cpu::scratch<double>(rows);
    std::fill_n(z.get(), rows * kColumnsCpu, 0.0f);  // vectors are read whole
    std::fill_n(bias.get(), kColumnsCpu, 0.0f);
  }
};

// A run and where it begins.
struct Part : Run {
  int64_t t0, v0;

  Part(const Divergence& p, const Run& most, int64_t t0, int64_t v0)
      : Run{std::min(most.variants, p.variants - v0), std::min(most.tokens, p.tokens - t0)},
        t0(t0),
        v0(v0) {}
};

void take_states(const Divergence& p, const Space& space, const Part& part) {
  if (space.pairs) {
    const auto *P = static_cast<const bf16*>(p.P), *Q = static_cast<const bf16*>(p.Q);
    return pack_rows<kMR>(part.rows(), p.hidden, space.h.get(), [&](int64_t i) {
      const int64_t t = part.t0 + i % part.tokens, v = i / part.tokens - 1;
      return v < 0 ? P + t * p.hidden : Q + ((part.v0 + v) * p.tokens + t) * p.hidden;
    });
  }
  widen_rows(p.P, p.p_dtype, part.t0, part.tokens, p.hidden, space.h.get());
  for (int64_t v = 0; v < part.variants; ++v)
    widen_rows(p.Q, p.q_dtype, (part.v0 + v) * p.tokens + part.t0, part.tokens, p.hidden,
               space.h.get() + (1 + v) * part.tokens * p.hidden);
}

// z = h W^T for the block's rows of W.
void multiply_block(const Divergence& p, const Space& space, const Part& part, const Block& b) {
  if (space.pairs) {
    const bf16* W = static_cast<const bf16*>(p.W) + b.first * p.hidden;
    pack_rows<kNR>(b.n, p.hidden, space.w.get(), [&](int64_t i) { return W + i * p.hidden; });
    return multiply_pairs(space.h.get(), tiles(part.rows(), kMR), space.w.get(), tiles(b.n, kNR),
                          p.hidden / 2, space.z.get(), kColumnsCpu);
  }
  const float* W = static_cast<const float*>(p.W) + b.first * p.hidden;
  if (p.w_dtype != Dtype::f32) {
    widen_rows(p.W, p.w_dtype, b.first, b.n, p.hidden, space.w.get());
    W = space.w.get();
  }
  cpu::gemm({.m = part.rows(),
             .n = b.n,
             .k = p.hidden,
             .alpha = 1.0f,
             .A = space.h.get(),
             .a_row = p.hidden,
             .a_col = 1,
             .B = W,
             .b_row = 1,
             .b_col = p.hidden,
             .C = space.z.get(),
             .ldc = kColumnsCpu,
             .add = false});
}

void sum_block(const Divergence& p, const Space& space, const Part& part, const Block& b) {
  cpu::parallel_for(part.tokens, [&](int64_t t) {
    alignas(64) float e[kColumnsCpu];
    float* z = space.z.get() + t * kColumnsCpu;
    const int64_t target = p.targets[part.t0 + t];
    const double shrink = add_first(space.sides[t], b, target, z, e);
    for (int64_t i = t + part.tokens; i < part.rows(); i += part.tokens) {
      float* other = space.z.get() + i * kColumnsCpu;
      space.a[i] = space.a[i] * shrink + add_other(space.sides[i], b, target, other, z, e);
    }
  });
}

void diverge(const Divergence& p, const Space& space, const Part& part) {
  take_states(p, space, part);
  std::fill_n(space.sides.get(), part.rows(), fresh_side());
  std::fill_n(space.a.get(), part.rows(), 0.0);
  for (int64_t j = 0; j < p.vocabulary; j += kColumnsCpu) {
    const Block b{.first = j,
                  .n = std::min(kColumnsCpu, p.vocabulary - j),
                  .bias = p.bias ? space.bias.get() : nullptr,
                  .scale = p.scale,
                  .cap = p.cap};
    if (b.bias)
      dispatch<float, f16, bf16>(p.bias_dtype, "bias", [&]<class T>() {
        widen(static_cast<const T*>(p.bias) + j, b.n, space.bias.get());
      });
    cpu::check_interrupt();
    multiply_block(p, space, part, b);
    sum_block(p, space, part, b);
  }
  for (int64_t i = part.tokens; i < part.rows(); ++i) {
    const int64_t t = i % part.tokens, v = i / part.tokens - 1;
    conclude(space.sides[t], space.sides[i], space.a[i],
             p.out + 4 * ((part.v0 + v) * p.tokens + part.t0 + t));
  }
}

}  // namespace

void influence_similarity(const Similarity& p) {
  dispatch<float, f16, bf16>(p.dtype, "X", [&]<class T>() {
    for_rows(p.tokens, [&](int64_t t) { compare_rows<T>(p, t); });
  });
}

void influence_divergence(const Divergence& p) {
  const Run most = run_of(p.variants, p.tokens, kRowsCpu);
  const Space space(p, most.rows());
  for (int64_t v = 0; v < p.variants; v += most.variants)
    for (int64_t t = 0; t < p.tokens; t += most.tokens) diverge(p, space, Part(p, most, t, v));
}

}  // namespace distaya::DISTAYA_ISA

#else

namespace distaya {

void similarity_cpu(const Similarity& p) {
  switch (cpu::isa()) {
    case cpu::Isa::avx512: return avx512::influence_similarity(p);
    case cpu::Isa::avx2: return avx2::influence_similarity(p);
    default: return portable::influence_similarity(p);
  }
}

void divergence_cpu(const Divergence& p) {
  switch (cpu::isa()) {
    case cpu::Isa::avx512: return avx512::influence_divergence(p);
    case cpu::Isa::avx2: return avx2::influence_divergence(p);
    default: return portable::influence_divergence(p);
  }
}

}  // namespace distaya

#endif
