// Textual part of obs_cpu.cpp: which weights go. A mask tile is uint8_t [columns][kNR], 1 = kept.

// N:M: of m columns of the tile T ([m][kNR], current weights), those with the drop smallest
// T^2 D per lane go; among equals the lower index. M = m where m is known when compiling, else 0.
template <int M>
void choose_nm(const float* T, const float* D, int64_t m, int64_t drop, uint8_t* keep) {
  constexpr int kMost = M ? M : 32;
  const int count = M ? M : static_cast<int>(m);
  const vi limit = vi{} + static_cast<int32_t>(drop);
  for (int64_t v = 0; v < kNR; v += kLanes) {
    vf score[kMost];
    vi rank[kMost];
    for (int c = 0; c < count; ++c) {
      const vf w = load(T + c * kNR + v);
      score[c] = w * w * splat(D[c]);
      rank[c] = vi{};
      for (int b = 0; b < c; ++b) {  // a comparison is -1 where true
        const vi first = score[b] <= score[c];
        rank[c] -= first;
        rank[b] += first + 1;
      }
    }
    for (int c = 0; c < count; ++c)
      store(keep + c * kNR + v, select(rank[c] < limit, vf{}, splat(1.f)));
  }
}

// Unstructured: the last weight of a block to go, in the order (score, row-major index).
struct Cut {
  float score = -1;
  int64_t index = 0;  // row * kObsBlock + column in the block

  bool operator<(const Cut& other) const {
    return score < other.score || (score == other.score && index < other.index);
  }
};

DISTAYA_INLINE uint32_t lane_bits(vi mask) {
#if DISTAYA_LANES == 16
  return _mm512_movepi32_mask((__m512i)mask);
#elif DISTAYA_LANES == 8
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (mask[i] & 1u) << i;
  return bits;
#endif
}

// The entry weights of a block for all rows, as panels of tiles, and their costs' diagonal.
struct Entry {
  const float* T;      // [panels][height][kNR]
  const float* D;      // [cols]
  int64_t rows, cols;  // cols of this block; height >= cols
  int64_t height;
};

// Scores of single weights spread over rows and columns: a guess of where the cut lies.
inline std::vector<float> sample_scores(const Entry& e) {
  const int64_t total = e.rows * e.cols;
  const int64_t step = std::max<int64_t>(64, total / 16384) | 1;  // odd: visits all columns
  std::vector<float> scores;
  for (int64_t i = 0; i < total; i += step) {
    const int64_t row = i / e.cols, j = i % e.cols;
    const float w = e.T[((row / kNR) * e.height + j) * kNR + row % kNR];
    scores.push_back(w * w * e.D[j]);
  }
  return scores;
}

// Counts scores below `low` and lists those in [low, high], per panel.
inline int64_t scan_panel(const Entry& e, int64_t panel, float low, float high,
                          std::vector<Cut>& found) {
  const float* T = e.T + panel * e.height * kNR;
  const int64_t rows = std::min<int64_t>(kNR, e.rows - panel * kNR);
  vi below = {};
  for (int64_t v = 0; v < rows; v += kLanes) {
    vi valid;
    for (int l = 0; l < kLanes; ++l) valid[l] = v + l < rows ? -1 : 0;
    for (int64_t j = 0; j < e.cols; ++j) {
      const vf w = load(T + j * kNR + v);
      const vf score = w * w * splat(e.D[j]);
      below -= (score < splat(low)) & valid;
      uint32_t bits = lane_bits((score >= splat(low)) & (score <= splat(high)) & valid);
      for (; bits; bits &= bits - 1) {
        const int l = __builtin_ctz(bits);
        found.push_back({score[l], (panel * kNR + v + l) * kObsBlock + j});
      }
    }
  }
  int64_t total = 0;
  for (int l = 0; l < kLanes; ++l) total += below[l];
  return total;
}

struct Between {
  int64_t below;  // how many lie below the bracket
  std::vector<Cut> found;
};

// The block's scores in [low, high].
inline Between list_between(const Entry& e, float low, float high) {
  const int64_t panels = (e.rows + kNR - 1) / kNR;
  std::vector<std::vector<Cut>> found(static_cast<size_t>(panels));
  std::vector<int64_t> below(static_cast<size_t>(panels));
  cpu::parallel_for(panels, [&](int64_t i) {
    const auto at = static_cast<size_t>(i);
    below[at] = scan_panel(e, i, low, high, found[at]);
  });
  Between all{};
  for (size_t i = 0; i < found.size(); ++i) {
    all.below += below[i];
    all.found.insert(all.found.end(), found[i].begin(), found[i].end());
  }
  return all;
}

// The k-th smallest (k >= 1) of the block's scores if it lies in [low, high].
inline std::optional<Cut> find_between(const Entry& e, int64_t k, float low, float high) {
  auto [below, all] = list_between(e, low, high);
  const int64_t at = k - 1 - below;
  if (at < 0 || at >= static_cast<int64_t>(all.size())) return std::nullopt;
  std::nth_element(all.begin(), all.begin() + at, all.end());
  return all[static_cast<size_t>(at)];
}

// The k-th smallest (k >= 1) of the block's scores. A sample brackets it; one pass counts what lies
// below the bracket and lists what lies inside. A wrong guess costs a pass with a wider bracket.
inline Cut find_cut(const Entry& e, int64_t k) {
  std::vector<float> sample = sample_scores(e);
  const auto n = static_cast<double>(sample.size());
  const auto rank = [&](double at) {  // the sample's score of that rank, 0 or infinity beyond
    if (at < 0) return 0.f;
    if (at >= n) return INFINITY;
    const auto middle = sample.begin() + static_cast<int64_t>(at);
    std::nth_element(sample.begin(), middle, sample.end());
    return *middle;
  };
  const double at = n * static_cast<double>(k) / static_cast<double>(e.rows * e.cols);
  for (const double sigmas : {2.5, 12.0, 1e9}) {  // of the sample's rank at the median
    const double margin = sigmas * (std::sqrt(n) / 2 + 4);
    if (const auto cut = find_between(e, k, rank(at - margin), rank(at + margin))) return *cut;
  }
  fail("W or R holds NaN: ", e.rows, " x ", e.cols, " scores cannot be ordered");
}

// Marks what the cut keeps of one panel. ties: everything with the cut's score goes (as published).
inline void apply_cut(const Entry& e, int64_t panel, const Cut& cut, bool ties, uint8_t* keep) {
  const float* T = e.T + panel * e.height * kNR;
  const int64_t cut_row = cut.index / kObsBlock, cut_col = cut.index % kObsBlock;
  for (int64_t v = 0; v < kNR; v += kLanes) {
    vi last;  // of the lanes' weights that equal the cut, columns <= last go
    for (int l = 0; l < kLanes; ++l) {
      const int64_t row = panel * kNR + v + l;
      last[l] = static_cast<int32_t>(ties || row < cut_row ? kObsBlock
                                     : row == cut_row      ? cut_col
                                                           : -1);
    }
    for (int64_t j = 0; j < e.cols; ++j) {
      const vf w = load(T + j * kNR + v);
      const vf score = w * w * splat(e.D[j]);
      const vi tied = (score == splat(cut.score)) & (last >= static_cast<int32_t>(j));
      store(keep + j * kNR + v, select((score < splat(cut.score)) | tied, vf{}, splat(1.f)));
    }
  }
}
