// The activations of gated MLPs on vectors. Read once per instruction set.
//
// With u = 2^-24, |act as computed - act(g)| <= 10 u |g| for silu, gelu and gelu_tanh.

namespace distaya::DISTAYA_ISA {

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

// 1 + erf(g / sqrt 2), twice the normal distribution function, through erfc(t) = s exp(P(s) - t^2)
// with s = 1 / (1 + t / 2), the form of Numerical Recipes 6.2; P is a fit of our own for t <= 10,
// error 5e-8.
DISTAYA_INLINE vf normal_twice(vf g) {
  const vf s = splat(1.0f) / fma(abs(g), splat(0.353553391f), splat(1.0f));
  vf p = splat(0.14493021f);
  for (const float c : {-0.68082720f, 1.1567338f, -0.69625193f, -0.080280431f, 0.0012675846f,
                        0.034602802f, 0.38664040f, 0.99863279f, -1.2654480f})
    p = fma(p, s, splat(c));
  const vf erfc = s * exp(fma(g * splat(-0.5f), g, p));
  return select(g < splat(0.0f), erfc, splat(2.0f) - erfc);
}

DISTAYA_INLINE vf gelu(vf g) { return splat(0.5f) * g * normal_twice(g); }

}  // namespace distaya::DISTAYA_ISA
