// Textual part of sqgemm_cpu.cpp: fp32 sums -> y. Bias, the gate of a GLU, one rounding.
//
// With u = 2^-24, |act as computed - act(g)| <= 10 u |g| for silu, gelu and gelu_tanh.

// e^x within 4 u relative; 0 below -104 and Inf above 88.73, NaN stays.
DISTAYA_INLINE vf exp(vf x) {
  x = max(splat(-104.0f), min(splat(89.0f), x));  // in this order a NaN comes through
  const vf n = round_even(x * splat(1.44269504f));
  vf r = fma(n, splat(-0.693359375f), x);  // ln 2 in two parts: n times the first is exact
  r = fma(n, splat(2.12194440e-4f), r);
  // Least-squares fit on Chebyshev points of |r| <= ln(2) / 2, error 2e-9.
  vf p = splat(0.0013948624f);
  for (const float c : {0.0083751595f, 0.041666217f, 0.16666415f, 0.5f, 1.0f, 1.0f})
    p = fma(p, r, splat(c));
  const vi whole = __builtin_convertvector(n, vi), half = whole >> 1;  // 2^n itself may overflow
  return p * bits_to_float((vu)(half + 127) << 23) * bits_to_float((vu)(whole - half + 127) << 23);
}

DISTAYA_INLINE vf silu(vf g) { return g / (splat(1.0f) + exp(-g)); }

// g / 2 (1 + tanh(z)) = g / (1 + e^-2z) with z = sqrt(2 / pi) (g + 0.044715 g^3).
DISTAYA_INLINE vf gelu_tanh(vf g) {
  const vf z = g * fma(g * g, splat(0.0713548163f), splat(1.59576912f));
  return g / (splat(1.0f) + exp(-z));
}

// g / 2 (1 + erf(g / sqrt 2)), through erfc(t) = s exp(P(s) - t^2) with s = 1 / (1 + t / 2), the
// form of Numerical Recipes 6.2; P is a fit of our own for t <= 10, error 5e-8.
DISTAYA_INLINE vf gelu(vf g) {
  const vf s = splat(1.0f) / fma(abs(g), splat(0.353553391f), splat(1.0f));
  vf p = splat(0.14493021f);
  for (const float c : {-0.68082720f, 1.1567338f, -0.69625193f, -0.080280431f, 0.0012675846f,
                        0.034602802f, 0.38664040f, 0.99863279f, -1.2654480f})
    p = fma(p, s, splat(c));
  const vf erfc = s * exp(fma(g * splat(-0.5f), g, p));
  return splat(0.5f) * g * select(g < splat(0.0f), erfc, splat(2.0f) - erfc);
}

// Sums of one token and kLanes rows (of which n exist) from `row` on, with the bias.
template <class T>
DISTAYA_INLINE vf biased(const float* C, const void* bias, int64_t row, int64_t n) {
  const vf sum = load(C);
  if (!bias) return sum;
  const T* b = static_cast<const T*>(bias) + row;
  return sum + (n < kLanes ? load_n(b, n) : load(b));
}

// y [t0, t1) x 64 rows of a row tile from C and, for a GLU, U: both [t1 - t0][64].
template <Activation kAct, class T>
void finish(const Problem& p, int64_t row_tile, int64_t t0, int64_t t1, const float* C,
            const float* U) {
  const int64_t row0 = row_tile * kTileRows;
  const int64_t rows = std::min<int64_t>(kTileRows, p.format.rows - row0);
  for (int64_t t = t0; t < t1; ++t, C += kTileRows, U += kAct == Activation::none ? 0 : kTileRows) {
    T* y = static_cast<T*>(p.y) + t * p.format.rows + row0;
    for (int64_t r = 0; r < rows; r += kLanes) {
      vf out = biased<T>(C + r, p.bias, row0 + r, rows - r);
      if constexpr (kAct == Activation::silu) out = silu(out);
      if constexpr (kAct == Activation::gelu) out = gelu(out);
      if constexpr (kAct == Activation::gelu_tanh) out = gelu_tanh(out);
      if constexpr (kAct != Activation::none)
        out = out * biased<T>(U + r, p.up_bias, row0 + r, rows - r);
      if (rows - r < kLanes)
        store_n(y + r, out, rows - r);
      else
        store(y + r, out);
    }
  }
}

template <class T>
void finish(const Problem& p, int64_t row_tile, int64_t t0, int64_t t1, const float* C,
            const float* U) {
  switch (p.act) {
    case Activation::silu: return finish<Activation::silu, T>(p, row_tile, t0, t1, C, U);
    case Activation::gelu: return finish<Activation::gelu, T>(p, row_tile, t0, t1, C, U);
    case Activation::gelu_tanh: return finish<Activation::gelu_tanh, T>(p, row_tile, t0, t1, C, U);
    default: return finish<Activation::none, T>(p, row_tile, t0, t1, C, U);
  }
}
