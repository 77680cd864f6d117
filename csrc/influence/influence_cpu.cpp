// Rows compared in fp64, and the head as one product per block of the vocabulary for all rows of P
// and Q, whose logits are summed up while they are in the caches (influence.h has the formulas).
#include "core/gemm.h"
#include "influence/influence.h"

#define DISTAYA_ISA_FILE "influence/influence_cpu.cpp"
#include "core/foreach_isa.h"

#ifdef DISTAYA_ISA_PASS
#include "core/activation.h"

namespace distaya::DISTAYA_ISA {
namespace {

typedef double vd __attribute__((vector_size(DISTAYA_LANES * 8)));

DISTAYA_INLINE vd wide(vf x) { return __builtin_convertvector(x, vd); }

DISTAYA_INLINE double sum(vd x) {  // fixed tree: same bits every time
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

// Calls body(j, x, y) for the vectors of two rows; what lies beyond them is 0.
template <class T, class Body>
DISTAYA_INLINE void along(const T* x, const T* y, int64_t n, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) body(wide(load(x + j)), wide(load(y + j)));
  if (j < n) body(wide(load_n(x + j, n - j)), wide(load_n(y + j, n - j)));
}

template <class T>
void compare_rows(const Similarity& p, int64_t t) {
  const T* x = static_cast<const T*>(p.X) + t * p.hidden;
  const T* y = static_cast<const T*>(p.Y) + t * p.hidden;
  vd xx{}, yy{}, moved{};
  along(x, y, p.hidden, [&](vd a, vd b) __attribute__((always_inline)) {
    const vd d = b - a;
    xx += a * a, yy += b * b, moved += d * d;
  });
  const double size_x = sum(xx), size_y = sum(yy);
  const double unit_x = 1 / std::sqrt(size_x), unit_y = 1 / std::sqrt(size_y);
  vd apart{}, together{};
  along(x, y, p.hidden, [&](vd a, vd b) __attribute__((always_inline)) {
    const vd u = a * unit_x, v = b * unit_y, minus = u - v, plus = u + v;
    apart += minus * minus, together += plus * plus;
  });
  compare(size_x, size_y, sum(moved), sum(apart), sum(together), p.out + 3 * t);
}

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
  cpu::Scratch<float> h, w, z, bias;  // [rows, hidden], [kColumns, hidden], [rows, kColumns]
  cpu::Scratch<Side> sides;           // [rows]: those of P, then those of each Q
  cpu::Scratch<double> a;             // [rows], the first `tokens` of them not used
};

void add_block(const Divergence& p, const Space& space, const Run& run, int64_t t0,
               const Block& b) {
  const float* W =
      p.w_dtype == Dtype::f32 ? static_cast<const float*>(p.W) + b.first * p.hidden : space.w.get();
  if (W == space.w.get()) widen_rows(p.W, p.w_dtype, b.first, b.n, p.hidden, space.w.get());
  cpu::gemm({.m = run.rows(),
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
  cpu::parallel_for(run.tokens, [&](int64_t t) {
    alignas(64) float e[kColumnsCpu];
    float* z = space.z.get() + t * kColumnsCpu;
    const int64_t target = p.targets[t0 + t];
    const double shrink = add_first(space.sides[t], b, target, z, e);
    for (int64_t i = t + run.tokens; i < run.rows(); i += run.tokens) {
      float* other = space.z.get() + i * kColumnsCpu;
      space.a[i] = space.a[i] * shrink + add_other(space.sides[i], b, target, other, z, e);
    }
  });
}

// Tokens [t0, t0 + run.tokens) and Qs [v0, v0 + run.variants).
void diverge(const Divergence& p, const Space& space, const Run& run, int64_t t0, int64_t v0) {
  float* h = space.h.get();
  widen_rows(p.P, p.p_dtype, t0, run.tokens, p.hidden, h);
  for (int64_t v = 0; v < run.variants; ++v)
    widen_rows(p.Q, p.q_dtype, (v0 + v) * p.tokens + t0, run.tokens, p.hidden,
               h + (1 + v) * run.tokens * p.hidden);
  std::fill_n(space.sides.get(), run.rows(), fresh_side());
  std::fill_n(space.a.get(), run.rows(), 0.0);
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
    add_block(p, space, run, t0, b);
  }
  for (int64_t v = 0; v < run.variants; ++v)
    for (int64_t t = 0; t < run.tokens; ++t) {
      const int64_t i = (1 + v) * run.tokens + t;
      conclude(space.sides[t], space.sides[i], space.a[i],
               p.out + 4 * ((v0 + v) * p.tokens + t0 + t));
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
  const int64_t rows = most.rows();
  Space space{.h = cpu::scratch<float>(rows * p.hidden),
              .w = cpu::scratch<float>(p.w_dtype == Dtype::f32 ? 0 : kColumnsCpu * p.hidden),
              .z = cpu::scratch<float>(rows * kColumnsCpu),
              .bias = cpu::scratch<float>(kColumnsCpu),
              .sides = cpu::scratch<Side>(rows),
              .a = cpu::scratch<double>(rows)};
  std::fill_n(space.bias.get(), kColumnsCpu, 0.0f);  // vectors are read whole
  std::fill_n(space.z.get(), rows * kColumnsCpu, 0.0f);
  for (int64_t v = 0; v < p.variants; v += most.variants)
    for (int64_t t = 0; t < p.tokens; t += most.tokens)
      diverge(p, space,
              {.variants = std::min(most.variants, p.variants - v),
               .tokens = std::min(most.tokens, p.tokens - t)},
              t, v);
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
