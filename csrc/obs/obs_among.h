// Textual part of obs_cpu.cpp: the cut of a block whose rows lie on several ranks, by counting the
// digits of all scores. Every rank finds the same score, and of its own ties the last that goes.

// Adds the panel's scores to the bins of their digit, where the digits before it are `prefix`.
inline void count_panel(const Entry& e, int64_t panel, int pass, uint32_t prefix, int64_t* bins) {
  const int shift = shift_of(pass), settled = pass == 0 ? 31 : shift_of(pass - 1);
  const float* T = e.T + panel * e.height * kNR;
  const int64_t rows = std::min<int64_t>(kNR, e.rows - panel * kNR);
  for (int64_t v = 0; v < rows; v += kLanes) {
    vi valid;
    for (int l = 0; l < kLanes; ++l) valid[l] = v + l < rows ? -1 : 0;
    for (int64_t j = 0; j < e.cols; ++j) {
      const vf w = load(T + j * kNR + v);
      const vi u = (vi)(w * w * splat(e.D[j])) & 0x7fffffff;
      const vi same = u >> settled == static_cast<int32_t>(prefix);
      for (uint32_t bits = lane_bits(same & valid); bits; bits &= bits - 1)
        ++bins[u[__builtin_ctz(bits)] >> shift & (bins_of(pass) - 1)];
    }
  }
}

// bins [bins_of(pass)]: the same of all panels.
inline void count_digits(const Entry& e, int pass, uint32_t prefix, int64_t* bins) {
  const int64_t panels = (e.rows + kNR - 1) / kNR, n = bins_of(pass);
  const int64_t parts = std::min<int64_t>(cpu::threads(), panels);
  std::vector<int64_t> counts(static_cast<size_t>(parts * n));
  cpu::parallel_for(parts, [&](int64_t part) {
    for (int64_t i = part; i < panels; i += parts)
      count_panel(e, i, pass, prefix, counts.data() + part * n);
  });
  std::fill(bins, bins + n, int64_t{0});
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t b = 0; b < n; ++b) bins[b] += counts[static_cast<size_t>(part * n + b)];
}

// The k-th smallest (k >= 1) of the scores of all ranks, as a cut through those of this one.
inline Cut find_cut_among(const Entry& e, int64_t k, const Among& among) {
  uint32_t bits = 0;
  Place at{.bin = 0, .rest = k, .before = 0, .own = 0};
  for (int pass = 0; pass < kPasses; ++pass) {
    const int64_t n = bins_of(pass);
    count_digits(e, pass, bits, among.own);
    among.exchange(n);
    at = find_place(among, n, n, at.rest, false);
    bits = bits * static_cast<uint32_t>(n) + static_cast<uint32_t>(at.bin);
  }
  const auto score = std::bit_cast<float>(bits);
  if (std::isnan(score))
    fail("W or R holds NaN: ", among.total, " x ", e.cols, " scores cannot be ordered");
  const int64_t share = at.share();
  if (share == 0) return {score, -1};                       // before the first weight
  if (share == at.own) return {score, e.rows * kObsBlock};  // behind the last
  auto ties = list_between(e, score, score).found;
  std::nth_element(ties.begin(), ties.begin() + (share - 1), ties.end());
  return ties[static_cast<size_t>(share - 1)];
}
