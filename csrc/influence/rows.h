// fp64 sums over vectors, and hidden states compared by them. Read once per instruction set, after
// core/simd.h.

namespace distaya::DISTAYA_ISA {

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

}  // namespace distaya::DISTAYA_ISA
