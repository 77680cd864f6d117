// Conjugate gradients and ADMM as one product for all rows per iteration and one walk over each row
// (refit.h has the formulas). A row's sums run over lanes and then a fixed tree.
#include "core/gemm.h"
#include "refit/refit.h"

#define DISTAYA_ISA_FILE "refit/refit_cpu.cpp"
#include "core/foreach_isa.h"

#ifdef DISTAYA_ISA_PASS

namespace distaya::DISTAYA_ISA {
namespace {

typedef uint8_t vb __attribute__((vector_size(DISTAYA_LANES)));
typedef uint8_t vb_any __attribute__((vector_size(DISTAYA_LANES), aligned(1), may_alias));

// How many elements of a vector are there: all, known when compiled, or the row's last few.
struct Whole {};

struct Few {
  int64_t n;
};

template <class T>
DISTAYA_INLINE vf get(const T* p, Whole) {
  return load(p);
}

template <class T>
DISTAYA_INLINE vf get(const T* p, Few few) {
  return load_n(p, few.n);
}

template <class T>
DISTAYA_INLINE void put(T* p, vf x, Whole) {
  store(p, x);
}

template <class T>
DISTAYA_INLINE void put(T* p, vf x, Few few) {
  store_n(p, x, few.n);
}

// -1 where a mask byte is not 0.
DISTAYA_INLINE vi kept(const bool* p, Whole) {
  return __builtin_convertvector(*reinterpret_cast<const vb_any*>(p), vi) != 0;
}

DISTAYA_INLINE vi kept(const bool* p, Few few) {
  vb part = {};
  std::memcpy(&part, p, static_cast<size_t>(few.n));
  return __builtin_convertvector(part, vi) != 0;
}

template <class Body>
DISTAYA_INLINE void along(int64_t n, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) body(j, Whole{});
  if (j < n) body(j, Few{n - j});
}

constexpr int64_t kTask = 8;  // rows per task

template <class Body>
void for_rows(int64_t rows, const Body& body) {
  cpu::parallel_for((rows + kTask - 1) / kTask, [&](int64_t task) {
    for (int64_t i = task * kTask; i < std::min(rows, (task + 1) * kTask); ++i) body(i);
  });
}

// C = X B, or C += X B.
void product(int64_t rows, int64_t cols, const float* X, const float* B, float* C, bool add) {
  cpu::gemm({.m = rows,
             .n = cols,
             .k = cols,
             .alpha = 1.0f,
             .A = X,
             .a_row = cols,
             .a_col = 1,
             .B = B,
             .b_row = cols,
             .b_col = 1,
             .C = C,
             .ldc = cols,
             .add = add});
}

// Diagonal of H', its inverse where there is one, and what was added to H's.
struct Diagonal {
  cpu::Scratch<float> D, inverse;
  float damp;

  explicit Diagonal(const Refit& p)
      : D(cpu::scratch<float>(p.cols)), inverse(cpu::scratch<float>(p.cols)) {
    double sum = 0;
    for (int64_t j = 0; j < p.cols; ++j) sum += p.H[j * (p.cols + 1)];
    const double mean = sum / static_cast<double>(p.cols);
    damp = static_cast<float>(p.damp * (mean > 0 ? mean : 1.0));
    for (int64_t j = 0; j < p.cols; ++j) {
      D[j] = p.H[j * (p.cols + 1)] + damp;
      inverse[j] = D[j] > 0 ? 1 / D[j] : 0;
    }
  }
};

// Scratch of a run of rows, each [rows, cols].
struct Arrays {
  float *Q, *r, *p, *y;
};

// One row of everything.
struct Row {
  float *Q, *r, *p, *y;
  const bool* mask;
  const float *D, *inverse;
  float damp;
  int64_t cols;

  // E = T - Q into p.
  template <class T>
  void begin(const T* target, const float* start) const {
    along(cols, [&](int64_t j, auto n) {
      const vf t = get(target + j, n), q = start ? get(start + j, n) : t;
      const vf x = select(kept(mask + j, n), q, vf{});
      put(Q + j, x, n);
      put(p + j, t - x, n);
    });
  }

  // p = E and y = E H on entry, the first direction on exit; L of the start.
  double first(Search& s, double unit) const {
    vf loss{}, size{}, rz{};
    along(cols, [&](int64_t j, auto n) {
      const vf e = get(p + j, n), x = get(Q + j, n), g = fma(splat(damp), e, get(y + j, n));
      loss = fma(e, g, loss);
      size = fma(get(D + j, n), fma(e, e, x * x), size);
      const vf residual = select(kept(mask + j, n), g, vf{}), z = residual * get(inverse + j, n);
      rz = fma(residual, z, rz);
      put(r + j, residual, n);
      put(p + j, z, n);
    });
    begin_search(s, sum(rz), sum(size), unit);
    if (s.rz == 0) std::fill_n(p, cols, 0.0f);
    return 0.5 * sum(loss);
  }

  // How far along p, given y = p H; what that gains.
  float length(Search& s, double& gain) const {
    vf py{};
    along(cols, [&](int64_t j, auto n) {
      const vf x = get(p + j, n);
      py = fma(x, fma(splat(damp), x, get(y + j, n)), py);
    });
    const double a = step_length(s, sum(py));
    gain = 0.5 * a * s.rz;
    return static_cast<float>(a);
  }

  // One step and the next direction; what the step gained.
  double step(Search& s, double unit) const {
    if (s.rz == 0) return 0;
    double gain;
    const vf a = splat(length(s, gain));
    if (s.rz == 0) {
      std::fill_n(p, cols, 0.0f);
      return 0;
    }
    vf rz{};
    along(cols, [&](int64_t j, auto n) {
      const vf x = get(p + j, n), g = fma(splat(damp), x, get(y + j, n));
      put(Q + j, fma(a, x, get(Q + j, n)), n);
      const vf residual = select(kept(mask + j, n), fma(-a, g, get(r + j, n)), vf{});
      rz = fma(residual, residual * get(inverse + j, n), rz);
      put(r + j, residual, n);
    });
    const vf beta = splat(static_cast<float>(continue_search(s, a[0], sum(rz), unit)));
    if (s.rz == 0) {
      std::fill_n(p, cols, 0.0f);
    } else {
      along(cols, [&](int64_t j, auto n) {
        put(p + j, fma(beta, get(p + j, n), get(r + j, n) * get(inverse + j, n)), n);
      });
    }
    return gain;
  }

  // The last step (unless step is false) into the result; what it gained.
  template <class T>
  double finish(Search& s, bool step, T* out) const {
    double gain = 0;
    const vf a = splat(step && s.rz != 0 ? length(s, gain) : 0.0f);
    along(cols, [&](int64_t j, auto n) {
      put(out + j, s.rz == 0 ? get(Q + j, n) : fma(a, get(p + j, n), get(Q + j, n)), n);
    });
    return gain;
  }
};

// Rows [first, first + rows).
void refit_run(const Refit& p, const Diagonal& diagonal, const Arrays& arrays, Search* searches,
               int64_t first, int64_t rows) {
  const double unit = rounding_unit(p.cols);
  const auto row = [&](int64_t i) {
    const int64_t at = i * p.cols;
    return Row{arrays.Q + at,
               arrays.r + at,
               arrays.p + at,
               arrays.y + at,
               p.mask + first * p.cols + at,
               diagonal.D.get(),
               diagonal.inverse.get(),
               diagonal.damp,
               p.cols};
  };
  const int64_t origin = first * p.cols;
  dispatch<float, bf16, f16>(p.target_dtype, "target", [&]<class T>() {
    for_rows(rows, [&](int64_t i) {
      const int64_t at = origin + i * p.cols;
      row(i).begin(static_cast<const T*>(p.target) + at, p.start ? p.start + at : nullptr);
    });
  });
  product(rows, p.cols, arrays.p, p.H, arrays.y, false);
  for_rows(rows, [&](int64_t i) {
    p.before[first + i] = p.after[first + i] = row(i).first(searches[i], unit);
  });
  for (int64_t t = 0; t < p.iterations; ++t) {
    product(rows, p.cols, arrays.p, p.H, arrays.y, false);
    if (t + 1 == p.iterations) break;
    for_rows(rows, [&](int64_t i) { p.after[first + i] -= row(i).step(searches[i], unit); });
  }
  dispatch<float, bf16, f16>(p.dtype, "W", [&]<class T>() {
    for_rows(rows, [&](int64_t i) {
      T* out = static_cast<T*>(p.out) + origin + i * p.cols;
      p.after[first + i] -= row(i).finish(searches[i], p.iterations > 0, out);
    });
  });
}

}  // namespace

void refit(const Refit& p) {
  const Diagonal diagonal(p);
  const int64_t rows = rows_together(p.rows, p.cols, kRefitRunCpu), size = rows * p.cols;
  const auto memory = cpu::scratch<float>(4 * size);
  const auto searches = cpu::scratch<Search>(rows);
  const Arrays arrays{memory.get(), memory.get() + size, memory.get() + 2 * size,
                      memory.get() + 3 * size};
  for (int64_t i = 0; i < p.rows; i += rows)
    refit_run(p, diagonal, arrays, searches.get(), i, std::min(rows, p.rows - i));
}

void admm(const Admm& p) {
  for_rows(p.rows, [&](int64_t i) {
    const int64_t at = i * p.cols;
    along(p.cols, [&](int64_t j, auto n) {
      float* G = p.G + at + j;
      const vi keep = kept(p.mask + at + j, n);
      const vf g = get(G, n), U = select(keep, vf{}, g * splat(p.ratio));
      put(p.X + at + j, fma(splat(p.rho), select(keep, g, -U), get(p.Y + at + j, n)), n);
      put(G, U, n);
    });
  });
  product(p.rows, p.cols, p.X, p.inverse, p.G, true);
  for_rows(p.rows, [&](int64_t i) {
    const int64_t at = i * p.cols;
    along(p.cols, [&](int64_t j, auto n) { put(p.X + at + j, abs(get(p.G + at + j, n)), n); });
  });
}

void multiply(const Multiply& p) { product(p.rows, p.cols, p.X, p.B, p.C, true); }

}  // namespace distaya::DISTAYA_ISA

#else

namespace distaya {

void refit_cpu(const Refit& p) {
  switch (cpu::isa()) {
    case cpu::Isa::avx512: return avx512::refit(p);
    case cpu::Isa::avx2: return avx2::refit(p);
    default: return portable::refit(p);
  }
}

void admm_cpu(const Admm& p) {
  switch (cpu::isa()) {
    case cpu::Isa::avx512: return avx512::admm(p);
    case cpu::Isa::avx2: return avx2::admm(p);
    default: return portable::admm(p);
  }
}

void multiply_cpu(const Multiply& p) {
  switch (cpu::isa()) {
    case cpu::Isa::avx512: return avx512::multiply(p);
    case cpu::Isa::avx2: return avx2::multiply(p);
    default: return portable::multiply(p);
  }
}

}  // namespace distaya

#endif
