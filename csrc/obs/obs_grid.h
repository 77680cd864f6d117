// Textual part of obs_cpu.cpp: quantisation grids of kNR rows at once (formulas in obs.h, Grid).

// A grid per lane: scale and zero of kNR rows.
struct Grids {
  alignas(64) float scale[kNR];
  alignas(64) float zero[kNR];
};

DISTAYA_INLINE vf round_scale(vf scale, Dtype dtype) {
  if (dtype == Dtype::bf16) {
    bf16 narrow[kLanes];
    store(narrow, scale);
    scale = load(narrow);
  } else if (dtype == Dtype::f16) {
    f16 narrow[kLanes];
    store(narrow, min(scale, splat(65504.f)));
    return max(load(narrow), splat(0x1p-24f));
  }
  return max(scale, splat(0x1p-126f));
}

DISTAYA_INLINE vf clamp(vf x, vf low, vf high) { return min(max(x, low), high); }

DISTAYA_INLINE void place(const Grid& grid, vf low, vf high, vf& scale, vf& zero) {
  const vf top = splat(static_cast<float>((1 << grid.bits) - 1));
  scale = round_scale((high - low) / top, grid.scale_dtype);
  zero = grid.symmetric ? splat(static_cast<float>(1 << (grid.bits - 1)))
                        : clamp(round_even(-low / scale), vf{}, top);
}

DISTAYA_INLINE vf code_of(vf w, vf scale, vf zero, vf top) {
  return clamp(round_even(w / scale) + zero, vf{}, top);
}

// |d|^2.4 = d^2 (d^2)^(1/5), the fifth root by Newton steps on x^(-1/5) (relative error < 1e-6).
DISTAYA_INLINE vf power_2_4(vf d) {
  const vf x = max(d * d, splat(1e-30f));
  // The bits of a positive float are about 2^23 (log2 x + 127): scale them by -1/5.
  const vf bits = __builtin_convertvector((vi)x, vf);
  vf z = (vf) __builtin_convertvector(splat(1.2f * 127 * 0x1p23f) - bits * splat(0.2f), vi);
  for (int step = 0; step < 4; ++step) {
    const vf z2 = z * z;
    z = z * (splat(1.2f) - splat(0.2f) * (x * z) * z2 * z2);
  }
  const vf z2 = z * z;
  return x * x * z2 * z2;
}

// Of 80 shrunken ranges the one with the least sum |q - w|^2.4 over the n columns of w ([n][kNR]).
inline void shrink(const Grid& grid, const float* w, int64_t n, vf low, vf high, vf& scale,
                   vf& zero) {
  const vf top = splat(static_cast<float>((1 << grid.bits) - 1));
  vf best = splat(INFINITY);
  for (int i = 0; i < 80; ++i) {
    const vf p = splat(static_cast<float>(1 - i / 100.0));
    vf s, z, error = {};
    place(grid, p * low, p * high, s, z);
    for (int64_t j = 0; j < n; ++j) {
      const vf x = load(w + j * kNR);
      error += power_2_4(s * (code_of(x, s, z, top) - z) - x);
    }
    const vi better = error < best;
    best = select(better, error, best);
    scale = select(better, s, scale);
    zero = select(better, z, zero);
  }
}

// Grids of the n columns of the tile w ([n][kNR]).
inline void make_grids(const Grid& grid, const float* w, int64_t n, Grids& out) {
  for (int64_t v = 0; v < kNR; v += kLanes) {
    vf low = {}, high = {};
    for (int64_t j = 0; j < n; ++j) {
      const vf x = load(w + j * kNR + v);
      low = min(low, x);
      high = max(high, x);
    }
    if (grid.symmetric) {
      high = max(-low, high);
      low = select(low < vf{}, -high, low);
    }
    const vi empty = (low == vf{}) & (high == vf{});
    low = select(empty, splat(-1.f), low);
    high = select(empty, splat(1.f), high);
    vf scale, zero;
    place(grid, low, high, scale, zero);
    if (grid.mse) shrink(grid, w + v, n, low, high, scale, zero);
    store(out.scale + v, scale);
    store(out.zero + v, zero);
  }
}

// Column `group` of scales and zeros [.., groups], rows [0, rows) <-> lanes; other lanes (1, 0).
inline void write_grids(const Grids& grids, int64_t rows, int64_t groups, float* scales,
                        float* zeros) {
  for (int64_t i = 0; i < rows; ++i) {
    scales[i * groups] = grids.scale[i];
    zeros[i * groups] = grids.zero[i];
  }
}

inline void read_grids(const float* scales, const float* zeros, int64_t groups, int64_t rows,
                       Grids& grids) {
  for (int64_t i = 0; i < kNR; ++i) {
    grids.scale[i] = i < rows ? scales[i * groups] : 1.f;
    grids.zero[i] = i < rows ? zeros[i * groups] : 0.f;
  }
}
