#include "dass/dass.h"

#define DISTAYA_ISA_FILE "dass/dass_cpu.cpp"
#include "core/foreach_isa.h"

#ifdef DISTAYA_ISA_PASS
#include "core/activation.h"

namespace distaya::DISTAYA_ISA {
namespace {

using dass::Act;

typedef double vd __attribute__((vector_size(DISTAYA_LANES * 8)));

constexpr int64_t kRows = 16;  // rows per task: enough work to hide the hand-over

template <class T>
void scores(const dass::Score& p) {
  const int64_t whole = p.cols / kLanes * kLanes;
  cpu::parallel_for((p.rows + kRows - 1) / kRows, [&](int64_t task) {
    for (int64_t i = task * kRows; i < std::min(p.rows, (task + 1) * kRows); ++i) {
      const T* W = static_cast<const T*>(p.W) + i * p.cols;
      float* S = p.S + i * p.cols;
      const double factor = dass::raised(p.norms[i], p.power);
      for (int64_t j = 0; j < whole; j += kLanes) {
        const vd s = __builtin_convertvector(abs(load(W + j)), vd) * factor;
        store(S + j, __builtin_convertvector(s, vf));
      }
      for (int64_t j = whole; j < p.cols; ++j)
        S[j] = static_cast<float>(std::fabs(static_cast<double>(to_float(W[j]))) * factor);
    }
  });
}

struct Bent {
  vf value, slope;  // act(g), act'(g)
};

template <Act act>
DISTAYA_INLINE Bent bend(vf g) {
  const vf one = splat(1.0f);
  if constexpr (act == Act::gelu) {
    const vf twice = normal_twice(g), density = splat(0.39894228f) * exp(splat(-0.5f) * g * g);
    return {splat(0.5f) * g * twice, fma(g, density, splat(0.5f) * twice)};
  } else {
    // Both are g s(z) with s the logistic function, so the slope is s + g s (1 - s) z'.
    vf z = g, rate = one;
    if constexpr (act == Act::gelu_tanh) {
      const vf square = g * g;
      z = g * fma(square, splat(0.0713548163f), splat(1.59576912f));
      rate = fma(square, splat(0.214064449f), splat(1.59576912f));
    }
    const vf e = exp(-z), s = one / (one + e);
    const vf rest = e * s;  // 1 - s without cancellation; where e overflows, s is 0
    const vf away = select(s == splat(0.0f), splat(0.0f), g * rate * rest);
    return {g / (one + e), s * (one + away)};
  }
}

constexpr int64_t kStrip = 16 * kLanes;  // neurons whose sums stay in L1

// Adds the terms of tokens [t0, t1) for n neurons from j0 on to acc [3][kStrip].
template <Act act, class T>
void terms(const dass::Moments& p, int64_t t0, int64_t t1, int64_t j0, int64_t n, float* acc) {
  for (int64_t t = t0; t < t1; ++t) {
    if (p.weights && p.weights[t] == 0) continue;
    const vf w = splat(p.weights ? p.weights[t] : 1.0f);
    const T* G = static_cast<const T*>(p.gate) + t * p.F + j0;
    const T* U = static_cast<const T*>(p.up) + t * p.F + j0;
    for (int64_t j = 0; j < n; j += kLanes) {
      const bool part = n - j < kLanes;
      const vf g = part ? load_n(G + j, n - j) : load(G + j);
      const vf u = part ? load_n(U + j, n - j) : load(U + j);
      const Bent bent = bend<act>(g);
      const vf term[3] = {bent.value * u, bent.value, bent.slope * u};
      for (int k = 0; k < 3; ++k) {
        float* sum = acc + k * kStrip + j;
        store(sum, fma(w * term[k], term[k], load(sum)));
      }
    }
  }
}

template <Act act, class T>
void moments(const dass::Moments& p) {
  cpu::parallel_for((p.F + kStrip - 1) / kStrip, [&](int64_t strip) {
    const int64_t j0 = strip * kStrip, n = std::min(kStrip, p.F - j0);
    float acc[3 * kStrip];
    for (int64_t t0 = 0; t0 < p.T; t0 += dass::kRun) {
      std::memset(acc, 0, sizeof acc);
      terms<act, T>(p, t0, std::min(p.T, t0 + dass::kRun), j0, n, acc);
      for (int k = 0; k < 3; ++k)
        for (int64_t j = 0; j < n; ++j) p.s[k * p.F + j0 + j] += acc[k * kStrip + j];
    }
  });
}

// What is pruned from a group of M values in one lane, with any one of them taken out and b put in
// its place: without[i] + min(b, last[i]).
template <int M>
struct Group {
  vf pruned;               // sum of the `dropped` smallest
  vf without[M], last[M];  // of the others: sum of the dropped - 1 smallest; the next one
};

template <int M>
DISTAYA_INLINE Group<M> judge(const vf* x, int dropped) {
  vf sorted[M];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) sorted[i] = x[i];
#pragma GCC unroll 8
  for (int i = 0; i + 1 < M; ++i)
#pragma GCC unroll 8
    for (int k = 0; k + 1 < M - i; ++k) {
      const vf low = min(sorted[k], sorted[k + 1]), high = max(sorted[k], sorted[k + 1]);
      sorted[k] = low, sorted[k + 1] = high;
    }
  Group<M> out;
  out.pruned = sorted[0];
  for (int k = 1; k < dropped; ++k) out.pruned = out.pruned + sorted[k];
  const vf worst = sorted[dropped - 1], next = sorted[dropped];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    const vi in = x[i] <= worst;
    out.without[i] = out.pruned - select(in, x[i], worst);
    out.last[i] = select(in, next, worst);
  }
  return out;
}

// A sum in kFold lanes, feature f in lane f mod kFold, and its total by the tree of every machine.
struct Fold {
  float lane[dass::kFold] = {};

  DISTAYA_INLINE void add(Fold& fold, int64_t f, vf x) {
    float* at = fold.lane + f % dass::kFold;
    store(at, load(at) + x);
  }

  float total() {
    for (int width = dass::kFold / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    return lane[0];
  }
};

template <int M>
void exchange(const dass::Balance& p, int64_t* a, int64_t* b) {
  Fold now, then[M][M];
  const float *from_a[M], *from_b[M];
  for (int i = 0; i < M; ++i) {
    from_a[i] = p.scores + a[i] * p.features;
    from_b[i] = p.scores + b[i] * p.features;
  }
  for (int64_t f = 0; f < p.features; f += kLanes) {
    const int64_t n = p.features - f;
    vf x[M], y[M];
    for (int i = 0; i < M; ++i) {
      x[i] = n < kLanes ? load_n(from_a[i] + f, n) : load(from_a[i] + f);
      y[i] = n < kLanes ? load_n(from_b[i] + f, n) : load(from_b[i] + f);
    }
    const Group<M> left = judge<M>(x, M - p.n), right = judge<M>(y, M - p.n);
    Fold::add(now, f, left.pruned + right.pruned);
    for (int i = 0; i < M; ++i)
      for (int k = 0; k < M; ++k)
        Fold::add(then[i][k], f,
                  (left.without[i] + min(y[k], left.last[i])) +
                      (right.without[k] + min(x[i], right.last[k])));
  }
  const float mass = now.total();
  float best = mass - mass * dass::kGain;
  int place = -1;
  for (int k = 0; k < M * M; ++k) {
    const float other = then[k / M][k % M].total();
    if (other < best) best = other, place = k;
  }
  if (place >= 0) std::swap(a[place / M], b[place % M]);
}

template <int M>
void balance(const dass::Balance& p) {
  for (int64_t round = 0; round < p.rounds; ++round) {
    cpu::check_interrupt();
    cpu::parallel_for((p.groups + 1) / 2, [&](int64_t k) {
      const dass::Pair pair = dass::pair_of(p.groups, round, k);
      if (pair.b < p.groups) exchange<M>(p, p.order + pair.a * M, p.order + pair.b * M);
    });
  }
}

}  // namespace

void dass_score(const dass::Score& p) {
  dispatch<float, f16, bf16>(p.dtype, "W", [&]<class T>() { scores<T>(p); });
}

void dass_moments(const dass::Moments& p) {
  dispatch<float, f16, bf16>(p.dtype, "gate", [&]<class T>() {
    switch (p.act) {
      case Act::silu: return moments<Act::silu, T>(p);
      case Act::gelu: return moments<Act::gelu, T>(p);
      default: return moments<Act::gelu_tanh, T>(p);
    }
  });
}

void dass_balance(const dass::Balance& p) {
  switch (p.m) {
    case 2: return balance<2>(p);
    case 4: return balance<4>(p);
    default: return balance<8>(p);
  }
}

}  // namespace distaya::DISTAYA_ISA

#else

namespace distaya::dass {

void score_cpu(const Score& p) {
  switch (cpu::isa()) {
    case cpu::Isa::avx512: return avx512::dass_score(p);
    case cpu::Isa::avx2: return avx2::dass_score(p);
    default: return portable::dass_score(p);
  }
}

void moments_cpu(const Moments& p) {
  switch (cpu::isa()) {
    case cpu::Isa::avx512: return avx512::dass_moments(p);
    case cpu::Isa::avx2: return avx2::dass_moments(p);
    default: return portable::dass_moments(p);
  }
}

void balance_cpu(const Balance& p) {
  switch (cpu::isa()) {
    case cpu::Isa::avx512: return avx512::dass_balance(p);
    case cpu::Isa::avx2: return avx2::dass_balance(p);
    default: return portable::dass_balance(p);
  }
}

}  // namespace distaya::dass

#endif
