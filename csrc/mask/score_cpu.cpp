#include "mask/mask.h"

#define DISTAYA_ISA_FILE "mask/score_cpu.cpp"
#include "core/foreach_isa.h"

#ifdef DISTAYA_ISA_PASS

namespace distaya::DISTAYA_ISA {
namespace {

typedef double vd __attribute__((vector_size(DISTAYA_LANES * 8)));
typedef double vd_any __attribute__((vector_size(DISTAYA_LANES * 8), aligned(8), may_alias));

DISTAYA_INLINE vd widen(vf x) { return __builtin_convertvector(x, vd); }

constexpr int64_t kRows = 16;  // rows per task: enough work to hide the hand-over

template <class T>
void plain_scores(const mask::Score& p) {
  const int64_t cols = p.cols, whole = cols / kLanes * kLanes;
  cpu::parallel_for((p.rows + kRows - 1) / kRows, [&](int64_t task) {
    for (int64_t i = task * kRows; i < std::min(p.rows, (task + 1) * kRows); ++i) {
      const T* W = static_cast<const T*>(p.W) + i * cols;
      float* S = p.S + i * cols;
      if (p.norms) {
        for (int64_t j = 0; j < whole; j += kLanes)
          store(S + j, abs(load(W + j)) * load(p.norms + j));
        for (int64_t j = whole; j < cols; ++j) S[j] = std::fabs(to_float(W[j])) * p.norms[j];
      } else {
        for (int64_t j = 0; j < whole; j += kLanes) store(S + j, abs(load(W + j)));
        for (int64_t j = whole; j < cols; ++j) S[j] = std::fabs(to_float(W[j]));
      }
    }
  });
}

// Where the parts of RIA's workspace lie.
struct Work {
  double *row, *col, *power, *partial;

  explicit Work(const mask::Score& p)
      : row(p.work), col(row + p.rows), power(col + p.cols), partial(power + p.cols) {}
};

double inverse(double sum) { return sum == 0 ? 0 : 1 / sum; }

// One walk over W along its rows gives both sums, in fp64: |W| of a row into lane accumulators, and
// each band of rows into its own line of partial column sums.
template <class T>
void sums(const mask::Score& p, const Work& work) {
  const int64_t cols = p.cols, whole = cols / kLanes * kLanes;
  const int64_t height = (p.rows + mask::kBands - 1) / mask::kBands;
  cpu::parallel_for(mask::kBands, [&](int64_t band) {
    double* partial = work.partial + band * cols;
    std::fill_n(partial, cols, 0.0);
    for (int64_t i = band * height; i < std::min(p.rows, (band + 1) * height); ++i) {
      const T* W = static_cast<const T*>(p.W) + i * cols;
      vd lanes = {};
      for (int64_t j = 0; j < whole; j += kLanes) {
        const vd a = widen(abs(load(W + j)));
        lanes += a;
        *reinterpret_cast<vd_any*>(partial + j) += a;
      }
      double sum = 0;
      for (int l = 0; l < kLanes; ++l) sum += lanes[l];
      for (int64_t j = whole; j < cols; ++j) {
        const double a = std::fabs(to_float(W[j]));
        sum += a;
        partial[j] += a;
      }
      work.row[i] = inverse(sum);
    }
  });
  for (int64_t j = 0; j < cols; ++j) work.col[j] = 0;
  for (int64_t band = 0; band < mask::kBands; ++band)
    for (int64_t j = 0; j < cols; ++j) work.col[j] += work.partial[band * cols + j];
  for (int64_t j = 0; j < cols; ++j) {
    work.col[j] = inverse(work.col[j]);
    work.power[j] = std::pow(static_cast<double>(p.norms[j]), p.power);
  }
}

template <class T>
void ria_scores(const mask::Score& p) {
  const Work work(p);
  sums<T>(p, work);
  const int64_t cols = p.cols, whole = cols / kLanes * kLanes;
  cpu::parallel_for((p.rows + kRows - 1) / kRows, [&](int64_t task) {
    for (int64_t i = task * kRows; i < std::min(p.rows, (task + 1) * kRows); ++i) {
      const T* W = static_cast<const T*>(p.W) + i * cols;
      float* S = p.S + i * cols;
      const double row = work.row[i];
      for (int64_t j = 0; j < whole; j += kLanes) {
        const vd s = widen(abs(load(W + j))) *
                     (*reinterpret_cast<const vd_any*>(work.col + j) + row) *
                     *reinterpret_cast<const vd_any*>(work.power + j);
        store(S + j, __builtin_convertvector(s, vf));
      }
      for (int64_t j = whole; j < cols; ++j)
        S[j] = static_cast<float>(std::fabs(to_float(W[j])) * (work.col[j] + row) * work.power[j]);
    }
  });
}

}  // namespace

void mask_score(const mask::Score& p) {
  dispatch<float, f16, bf16>(p.dtype, "W", [&]<class T>() {
    if (p.work)
      ria_scores<T>(p);
    else
      plain_scores<T>(p);
  });
}

}  // namespace distaya::DISTAYA_ISA

#else

namespace distaya::mask {

void score_cpu(const Score& p) {
  switch (cpu::isa()) {
    case cpu::Isa::avx512: return avx512::mask_score(p);
    case cpu::Isa::avx2: return avx2::mask_score(p);
    default: return portable::mask_score(p);
  }
}

}  // namespace distaya::mask

#endif
