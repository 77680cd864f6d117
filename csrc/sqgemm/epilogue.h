// Textual part of sqgemm_cpu.cpp: fp32 sums -> y. Bias, the gate of a GLU, one rounding.

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
