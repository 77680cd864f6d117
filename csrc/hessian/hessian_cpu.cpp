#include "hessian/hessian.h"
#include "hessian/tokens.h"

#define DISTAYA_ISA_FILE "hessian/hessian_cpu.cpp"
#include "core/foreach_isa.h"

#ifdef DISTAYA_ISA_PASS
#include "core/microkernel.h"

namespace distaya::DISTAYA_ISA {
namespace {

using cpu::Run;
using cpu::Tokens;

// X is packed into words of 4 bytes: one fp32 value, or the bf16 values of two tokens for the
// instruction that multiplies pairs. A run is stored as [column tiles of kNR][steps][kNR] words;
// the kMR columns of the left operand are a slice of such a tile, so X is packed once for both
// sides, and Y, where it is another matrix, alike.
static_assert(kNR % kMR == 0);
constexpr int64_t kBlock = 4 * kNR;           // H is walked in kBlock x kBlock squares, kept in L2
constexpr int64_t kPanel = 8 * kNR;           // columns packed by one task
constexpr int64_t kSquares = 32;              // of them per thread before Ctrl-C is looked for
constexpr int64_t kPackedBytes = 64LL << 20;  // scratch: more runs at once reread H less often

constexpr int64_t steps_of(int64_t tokens, bool pairs) { return pairs ? (tokens + 1) / 2 : tokens; }

constexpr int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// kLanes words from n >= 1 columns at x (and at y, the pair's second token, or null).
template <bool pairs, class T>
DISTAYA_INLINE vf words(const T* x, const T* y, int64_t n) {
  if constexpr (pairs) {
    uint16_t part[2][kLanes] = {};
    if (n < kLanes || !y) {
      const size_t bytes = sizeof(T) * static_cast<size_t>(std::min<int64_t>(n, kLanes));
      std::memcpy(part[0], x, bytes);
      if (y) std::memcpy(part[1], y, bytes);
      x = reinterpret_cast<const T*>(part[0]), y = reinterpret_cast<const T*>(part[1]);
    }
    const vh a = *reinterpret_cast<const vh_any*>(x), b = *reinterpret_cast<const vh_any*>(y);
    return bits_to_float(__builtin_convertvector(a, vu) | __builtin_convertvector(b, vu) << 16);
  } else {
    return n < kLanes ? load_n(x, n) : load(x);
  }
}

// Columns [j0, j1) of one run of X [T, C] -> out [tiles][steps][kNR], times the roots of weights.
template <bool pairs, class T>
void pack(const T* X, int64_t C, const Tokens& tokens, const Run& run, int64_t j0, int64_t j1,
          float* out) {
  const int64_t steps = steps_of(run.count, pairs), *token = tokens.token + run.first;
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t t = pairs ? 2 * s : s;
    const T* x = X + token[t] * C;
    const T* y = pairs && t + 1 < run.count ? X + token[t + 1] * C : nullptr;
    const vf root = splat(tokens.weights ? std::sqrt(tokens.weights[token[t]]) : 1.0f);
    for (int64_t j = j0; j < j1; j += kNR) {
      const int64_t at = (j / kNR * steps + s) * kNR;
      for (int v = 0; v < kNV; ++v) {
        const int64_t c = j + v * kLanes;
        const vf word = c < C ? words<pairs>(x + c, y ? y + c : nullptr, C - c) : vf{};
        store(out + at + v * kLanes, !pairs && tokens.weights ? root * word : word);
      }
    }
  }
}

// acc + (the products of one word of the left operand with kLanes words of the right one).
template <bool pairs>
DISTAYA_INLINE vf multiply_add(const float* a, vf b, vf acc) {
#if DISTAYA_LANES == 16
  if constexpr (pairs) {
    int32_t word;
    std::memcpy(&word, a, sizeof word);
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(word), (__m512bh)b);
  }
#endif
  return fma(splat(*a), b, acc);
}

// Adds weight * part [kMR][kNR] to a tile of H that sticks out of H (rows x cols remain) or crosses
// the diagonal (columns below row + skew are left alone).
void promote_edge(const float* part, float weight, float* H, int64_t ldh, int64_t rows,
                  int64_t cols, int64_t skew) {
  const vf w = splat(weight);
  for (int64_t i = 0; i < std::min<int64_t>(rows, kMR); ++i) {
    const int64_t first = std::max<int64_t>(0, i + skew), last = std::min<int64_t>(cols, kNR);
    float row[kNR] = {};
    for (int64_t j = first; j < last; ++j) row[j] = H[i * ldh + j];
    for (int j = 0; j < kNR; j += kLanes)
      store(row + j, fma(w, load(part + i * kNR + j), load(row + j)));
    for (int64_t j = first; j < last; ++j) H[i * ldh + j] = row[j];
  }
}

// One register tile: H[i.., j..] += weight * sum over the steps of A[.][0..kMR) B[.][0..kNR), with
// H pointing at (i, j). All loops over the
// tile are unrolled, or the accumulators would live in memory.
template <bool pairs>
void tile(int64_t steps, const float* A, const float* B, float weight, float* H, int64_t ldh,
          int64_t rows, int64_t cols, int64_t skew) {
  vf acc[kMR][kNV];
#pragma GCC unroll 8
  for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < kNV; ++v) {
      acc[i][v] = vf{};
      __builtin_prefetch(H + i * ldh + v * kLanes);
    }
#pragma GCC unroll 4
  for (int64_t s = 0; s < steps; ++s, A += kNR, B += kNR) {
    vf b[kNV];
#pragma GCC unroll 3
    for (int v = 0; v < kNV; ++v) b[v] = load(B + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 3
      for (int v = 0; v < kNV; ++v) acc[i][v] = multiply_add<pairs>(A + i, b[v], acc[i][v]);
  }
  if (rows >= kMR && cols >= kNR && skew + kMR <= 1) {
    const vf w = splat(weight);
#pragma GCC unroll 8
    for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 3
      for (int v = 0; v < kNV; ++v) {
        float* h = H + i * ldh + v * kLanes;
        store(h, fma(w, acc[i][v], load(h)));
      }
    return;
  }
  float part[kMR * kNR];
#pragma GCC unroll 8
  for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < kNV; ++v) store(part + i * kNR + v * kLanes, acc[i][v]);
  promote_edge(part, weight, H, ldh, rows, cols, skew);
}

// The square of H at (i0, j0), all runs [r0, r1) of a chunk, packed in A (left) and B (right), of
// which a step takes `left` and `right` words.
template <bool pairs>
void square(const Hessian& p, const Tokens& tokens, int64_t r0, int64_t r1, int64_t i0, int64_t j0,
            const float* A, int64_t left, const float* B, int64_t right) {
  const int64_t i1 = std::min(p.K, i0 + kBlock), j1 = std::min(p.C, j0 + kBlock);
  for (int64_t r = r0; r < r1; ++r) {
    const Run& run = tokens.run[r];
    const int64_t steps = steps_of(run.count, pairs);
    for (int64_t j = j0; j < j1; j += kNR)
      for (int64_t i = i0; i < (p.Y ? i1 : std::min(i1, j + kNR)); i += kMR)
        tile<pairs>(steps, A + i / kNR * kNR * steps + i % kNR, B + j * steps, run.weight,
                    p.H + i * p.C + j, p.C, p.K - i, p.C - j, p.Y ? -kMR : i - j);
    A += steps * left, B += steps * right;
  }
}

template <bool pairs, class T>
void multiply(const Hessian& p, const Tokens& tokens) {
  const T *X = static_cast<const T*>(p.X), *Y = p.Y ? static_cast<const T*>(p.Y) : X;
  const bool two = Y != X || p.K != p.C;                                        // sides to pack
  const int64_t right = pieces(p.C, kNR) * kNR, left = pieces(p.K, kNR) * kNR;  // words of a step
  const int64_t run_words = steps_of(kRun, pairs) * (two ? left + right : right);
  const int64_t fit = kPackedBytes / (run_words * static_cast<int64_t>(sizeof(float)));
  const int64_t chunk = std::min(tokens.runs, std::max<int64_t>(1, fit));
  const auto B = cpu::scratch<float>(chunk * run_words);
  float* A = two ? B.get() + chunk * steps_of(kRun, pairs) * right : B.get();
  const int64_t of_x = pieces(right, kPanel), panels = of_x + (two ? pieces(left, kPanel) : 0);
  const int64_t rows = pieces(p.K, kBlock), columns = pieces(p.C, kBlock);
  const auto start = cpu::scratch<int64_t>(chunk);  // first step of each run of the chunk
  for (int64_t r0 = 0; r0 < tokens.runs; r0 += chunk) {
    const int64_t r1 = std::min(tokens.runs, r0 + chunk);
    for (int64_t r = r0, at = 0; r < r1; ++r) {
      start[r - r0] = at;
      at += steps_of(tokens.run[r].count, pairs);
    }
    cpu::parallel_for((r1 - r0) * panels, [&](int64_t k) {
      const int64_t r = k / panels, panel = k % panels;
      const Run& run = tokens.run[r0 + r];
      if (const int64_t j0 = panel * kPanel; panel < of_x)
        return pack<pairs, T>(X, p.C, tokens, run, j0, std::min(right, j0 + kPanel),
                              B.get() + start[r] * right);
      const int64_t i0 = (panel - of_x) * kPanel;
      pack<pairs, T>(Y, p.K, tokens, run, i0, std::min(left, i0 + kPanel), A + start[r] * left);
    });
    const int64_t squares = p.Y ? rows * columns : columns * (columns + 1) / 2;
    cpu::parallel_for_interruptible(squares, kSquares * cpu::threads(), [&](int64_t k) {
      int64_t row = p.Y ? k / columns : 0;
      if (p.Y) k %= columns;
      while (!p.Y && k >= columns - row) k -= columns - row++;  // row by row of the upper triangle
      const int64_t column = p.Y ? k : row + k;
      square<pairs>(p, tokens, r0, r1, row * kBlock, column * kBlock, A, left, B.get(), right);
    });
  }
}

constexpr int64_t kStrip = 32 * kLanes;  // columns whose sums of squares stay in L1

// Adds w x^2 of one run to acc [kStrip] for the columns [j0, j0 + n).
template <class T>
void squares(const ColumnSq& p, const Tokens& tokens, const Run& run, int64_t j0, int64_t n,
             float* acc) {
  const int64_t* token = tokens.token + run.first;
  for (int64_t k = 0; k < run.count; k += 4) {  // four tokens for each visit to acc
    const int64_t m = std::min<int64_t>(4, run.count - k);
    const T* x[4] = {};
    vf w[4] = {};
    for (int64_t q = 0; q < m; ++q) {
      x[q] = static_cast<const T*>(p.X) + token[k + q] * p.C + j0;
      w[q] = splat(tokens.weights ? tokens.weights[token[k + q]] : run.weight);
    }
    for (int64_t j = 0; j < n; j += kLanes) {
      vf sum = load(acc + j);
      for (int64_t q = 0; q < m; ++q) {
        const vf value = n - j < kLanes ? load_n(x[q] + j, n - j) : load(x[q] + j);
        sum = fma(w[q] * value, value, sum);
      }
      store(acc + j, sum);
    }
  }
}

template <class T>
void column_sq(const ColumnSq& p, const Tokens& tokens) {
  cpu::parallel_for((p.C + kStrip - 1) / kStrip, [&](int64_t k) {
    const int64_t j0 = k * kStrip, n = std::min(kStrip, p.C - j0);
    float acc[kStrip];
    for (int64_t r = 0; r < tokens.runs; ++r) {
      std::memset(acc, 0, sizeof acc);
      squares<T>(p, tokens, tokens.run[r], j0, n, acc);
      for (int64_t j = 0; j < n; ++j) p.s[j0 + j] += acc[j];
    }
  });
}

}  // namespace

void hessian(const Hessian& p, const Tokens& tokens) {
  if (kLanes == 16 && p.dtype == Dtype::bf16 && !tokens.weights)
    return multiply<kLanes == 16, bf16>(p, tokens);
  dispatch<float, f16, bf16>(p.dtype, "X", [&]<class T>() { multiply<false, T>(p, tokens); });
}

void column_sq(const ColumnSq& p, const Tokens& tokens) {
  dispatch<float, f16, bf16>(p.dtype, "X", [&]<class T>() { column_sq<T>(p, tokens); });
}

void symmetrize(const Symmetrize& p) {
  constexpr int64_t kSide = 32;
  const int64_t blocks = (p.C + kSide - 1) / kSide;
  cpu::parallel_for(blocks, [&](int64_t k) {  // block row k of the lower triangle
    const int64_t j0 = k * kSide, j1 = std::min(p.C, j0 + kSide);
    for (int64_t i0 = 0; i0 <= j0; i0 += kSide) {
      const int64_t i1 = std::min(p.C, i0 + kSide);
      float part[kSide][kSide];  // the block's transpose: rows of H apart would share a cache set
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t j = j0; j < j1; ++j) part[j - j0][i - i0] = p.H[i * p.C + j];
      for (int64_t j = j0; j < j1; ++j)
        for (int64_t i = i0; i < std::min(i1, j); ++i) p.H[j * p.C + i] = part[j - j0][i - i0];
    }
  });
}

}  // namespace distaya::DISTAYA_ISA

#else

namespace distaya {

void hessian_cpu(const Hessian& p) {
  const cpu::Plan plan(p.weights, p.T);
  switch (cpu::isa()) {
    case cpu::Isa::avx512: return avx512::hessian(p, plan.tokens());
    case cpu::Isa::avx2: return avx2::hessian(p, plan.tokens());
    default: return portable::hessian(p, plan.tokens());
  }
}

void column_sq_cpu(const ColumnSq& p) {
  const cpu::Plan plan(p.weights, p.T);
  switch (cpu::isa()) {
    case cpu::Isa::avx512: return avx512::column_sq(p, plan.tokens());
    case cpu::Isa::avx2: return avx2::column_sq(p, plan.tokens());
    default: return portable::column_sq(p, plan.tokens());
  }
}

void symmetrize_cpu(const Symmetrize& p) {
  switch (cpu::isa()) {
    case cpu::Isa::avx512: return avx512::symmetrize(p);
    case cpu::Isa::avx2: return avx2::symmetrize(p);
    default: return portable::symmetrize(p);
  }
}

}  // namespace distaya

#endif
