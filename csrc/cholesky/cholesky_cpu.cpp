// Two levels of blocks, everything between them a GEMM: steps of 96 columns finish a slice of 384
// (the depth at which a GEMM touches C once), then one SYRK of that depth updates what is left.
// Only 96 x 96 diagonal blocks are worked on element by element, and multiplying by the inverse of
// so small a block is nearly as accurate as substitution.
#include "cholesky/cholesky.h"
#include "core/gemm.h"

#define DISTAYA_ISA_FILE "cholesky/cholesky_cpu.cpp"
#include "core/foreach_isa.h"

#ifndef DISTAYA_CHOLESKY_BLOCK
#define DISTAYA_CHOLESKY_BLOCK

namespace distaya::cpu {

constexpr int kBlock = 96;              // inner step: two or more tiles of every instruction set
constexpr int64_t kSlice = kGemmDepth;  // outer step

// Row-major with stride kBlock, zero outside the upper triangle of its leading w x w part.
struct Block {
  alignas(64) float at[kBlock][kBlock];
};

static_assert(kSlice % kBlock == 0 && kSlice <= kGemmInPlace);

}  // namespace distaya::cpu
#endif

#ifdef DISTAYA_ISA_PASS

namespace distaya::DISTAYA_ISA {
namespace {

using cpu::Block;
using cpu::kBlock;
constexpr int kVectors = kBlock / kLanes;

}  // namespace

// A (upper triangle) becomes its factor, last column first. Returns false at a pivot that is not
// finite. dropped[j] is set for floored columns; `column` is the block's place in H.
bool factor_block(Block& A, int w, float least, int64_t column, int64_t* info, bool* dropped) {
  for (int j = w - 1; j >= 0; --j) {
    const float pivot = A.at[j][j];
    if (!std::isfinite(pivot)) {
      info[kNotFinite] = column + j;
      return false;
    }
    dropped[j] = pivot < least;
    if (dropped[j] && info[kFloored]++ == 0) info[kFirstFloored] = column + j;
    const float root = std::sqrt(dropped[j] ? least : pivot);
    const float inverse = dropped[j] ? 0.0f : 1.0f / root;  // 0 * NaN stays NaN: still detected
    alignas(64) float v[kBlock] = {};                       // the finished column, as a row
    for (int i = 0; i < j; ++i) A.at[i][j] = v[i] = A.at[i][j] * inverse;
    A.at[j][j] = root;
    for (int i = 0; i < j; ++i) {
      const vf minus = splat(-v[i]);
      for (int l = i / kLanes * kLanes; l < j; l += kLanes)
        store(&A.at[i][l], fma(minus, load(v + l), load(&A.at[i][l])));
    }
  }
  for (int i = 1; i < w; ++i)
    std::fill(A.at[i], A.at[i] + i, 0.0f);  // updates ran over whole vectors
  return true;
}

// U = R^-1, from the last row up: U[i] = (e_i - sum_{m > i} R[i][m] U[m]) / R[i][i].
void invert_block(const Block& R, int w, Block& U) {
  std::memset(&U, 0, sizeof(U));
  for (int i = w - 1; i >= 0; --i) {
    vf row[kVectors] = {};
    for (int m = i + 1; m < w; ++m) {
      const vf r = splat(R.at[i][m]);
#pragma GCC unroll 24
      for (int v = 0; v < kVectors; ++v) row[v] = fma(r, load(&U.at[m][v * kLanes]), row[v]);
    }
    const float inverse = 1.0f / R.at[i][i];
    for (int v = 0; v < kVectors; ++v) store(&U.at[i][v * kLanes], row[v] * -inverse);
    U.at[i][i] = inverse;
  }
}

}  // namespace distaya::DISTAYA_ISA

#else

namespace distaya {
namespace {

using cpu::Block;
using cpu::Gemm;
using cpu::gemm;
using cpu::kBlock;
using cpu::kSlice;

bool factor_block(Block& A, int w, float least, int64_t column, int64_t* info, bool* dropped) {
  switch (cpu::isa()) {
    case cpu::Isa::avx512: return avx512::factor_block(A, w, least, column, info, dropped);
    case cpu::Isa::avx2: return avx2::factor_block(A, w, least, column, info, dropped);
    default: return portable::factor_block(A, w, least, column, info, dropped);
  }
}

void invert_block(const Block& R, int w, Block& U) {
  switch (cpu::isa()) {
    case cpu::Isa::avx512: return avx512::invert_block(R, w, U);
    case cpu::Isa::avx2: return avx2::invert_block(R, w, U);
    default: return portable::invert_block(R, w, U);
  }
}

// The upper triangle of the w x w block of an n x n matrix at (c, c), and back with its zeros.
void load_block(const float* A, int64_t n, int64_t c, int w, Block& out) {
  std::memset(&out, 0, sizeof(out));
  for (int i = 0; i < w; ++i)
    std::memcpy(&out.at[i][i], A + (c + i) * n + c + i, static_cast<size_t>(w - i) * sizeof(float));
}

void store_block(const Block& in, int64_t n, int64_t c, int w, float* A) {
  for (int i = 0; i < w; ++i)
    std::memcpy(A + (c + i) * n + c, in.at[i], static_cast<size_t>(w) * sizeof(float));
}

// Start of the block that ends at `end`: blocks begin at multiples of their size, so that columns
// stay aligned and the last one is the ragged one.
// Scans the diagonal, then damps it. Returns the smallest pivot allowed; false in `ok` for NaN/Inf.
float prepare(const Cholesky& p, bool& ok) {
  double sum = 0;
  std::fill(p.info, p.info + kInfo, 0);
  p.info[kFirstFloored] = p.info[kNotFinite] = -1;
  for (int64_t j = 0; j < p.n; ++j) {
    const float d = p.H[j * p.n + j];
    sum += d;
    p.info[kDead] += d == 0;
    if (!std::isfinite(d) && p.info[kNotFinite] < 0) p.info[kNotFinite] = j;
  }
  *p.mean = p.n ? sum / static_cast<double>(p.n) : 0.0;
  ok = p.info[kNotFinite] < 0;
  const double unit = *p.mean > 0 ? *p.mean : 1.0;
  for (int64_t j = 0; j < p.n; ++j) p.H[j * p.n + j] += static_cast<float>(p.damp * unit);
  return std::max(static_cast<float>(p.floor * unit), std::numeric_limits<float>::min());
}

// Columns [c, c + w) of R, complete above and on the diagonal.
bool factor_columns(const Cholesky& p, int64_t c, int w, float least) {
  Block diagonal, U;
  bool dropped[kBlock];
  load_block(p.H, p.n, c, w, diagonal);
  if (!factor_block(diagonal, w, least, c, p.info, dropped)) return false;
  store_block(diagonal, p.n, c, w, p.H);
  invert_block(diagonal, w, U);
  for (int j = 0; j < w; ++j)
    if (dropped[j]) std::fill(U.at[j], U.at[j] + kBlock, 0.0f);
  float* above = p.H + c;
  gemm({.m = c,
        .n = w,
        .k = w,
        .alpha = 1,
        .A = above,
        .a_row = p.n,
        .a_col = 1,
        .B = U.at[0],
        .b_row = 1,
        .b_col = kBlock,
        .C = above,
        .ldc = p.n,
        .add = false});
  return true;
}

// H[0:rows, to:rows] -= R[0:rows, c:c+k] R[to:rows, c:c+k]^T
void update(const Cholesky& p, int64_t rows, int64_t to, int64_t c, int64_t k, cpu::Part part) {
  const float* R = p.H + c;
  gemm({.m = rows,
        .n = rows - to,
        .k = k,
        .alpha = -1,
        .A = R,
        .a_row = p.n,
        .a_col = 1,
        .B = R + to * p.n,
        .b_row = 1,
        .b_col = p.n,
        .C = p.H + to,
        .ldc = p.n,
        .part = part});
}

}  // namespace

void cholesky_cpu(const Cholesky& p) {
  bool ok = true;
  const float least = prepare(p, ok);
  for (int64_t end = p.n; ok && end > 0;) {
    const int64_t begin = start_of(end, kSlice);
    for (int64_t c = end, next; ok && c > begin; c = next) {
      next = start_of(c, kBlock);
      ok = factor_columns(p, next, static_cast<int>(c - next), least);
      update(p, next, begin, next, c - next, cpu::Part::all);
    }
    update(p, begin, 0, begin, end - begin, cpu::Part::upper);
    end = begin;
  }
  cpu::parallel_for((p.n + kBlock - 1) / kBlock, [&](int64_t t) {
    for (int64_t i = t * kBlock; i < std::min<int64_t>(p.n, (t + 1) * kBlock); ++i)
      std::memset(p.H + i * p.n, 0, static_cast<size_t>(i) * sizeof(float));
  });
}

// Rows are finished from the bottom up. Until its turn a row of U holds the sum over finished rows
// S[i] = sum_m R[i, m] U[m], and then U[i] = R_ii^-1 (I - S[i]) for its block i.
void inverse_factor_cpu(const InverseFactor& p) {
  const int64_t n = p.n;
  const auto accumulate = [&](int64_t from, int64_t rows, int64_t c, int64_t k) {
    gemm({.m = rows,
          .n = n - c,
          .k = k,
          .alpha = 1,
          .A = p.R + from * n + c,
          .a_row = n,
          .a_col = 1,
          .B = p.U + c * n + c,
          .b_row = n,
          .b_col = 1,
          .C = p.U + from * n + c,
          .ldc = n});
  };
  cpu::parallel_for(
      n, [&](int64_t i) { std::memset(p.U + i * n, 0, static_cast<size_t>(n) * sizeof(float)); });
  Block R, U;
  for (int64_t end = n; end > 0;) {
    const int64_t begin = start_of(end, kSlice);
    for (int64_t last = end, c; last > begin; last = c) {
      c = start_of(last, kBlock);
      const int w = static_cast<int>(last - c);
      load_block(p.R, n, c, w, R);
      invert_block(R, w, U);
      store_block(U, n, c, w, p.U);
      float* right = p.U + c * n + last;
      gemm({.m = w,
            .n = n - last,
            .k = w,
            .alpha = -1,
            .A = U.at[0],
            .a_row = kBlock,
            .a_col = 1,
            .B = right,
            .b_row = n,
            .b_col = 1,
            .C = right,
            .ldc = n,
            .add = false});
      accumulate(begin, c - begin, c, w);
    }
    accumulate(0, begin, begin, end - begin);
    end = begin;
  }
}

void inverse_cpu(const Inverse& p) {
  const int64_t n = p.n;
  cpu::parallel_for(
      n, [&](int64_t i) { std::memset(p.out + i * n, 0, static_cast<size_t>(n) * sizeof(float)); });
  for (int64_t c = 0; c < n; c += kSlice) {  // rows c.. of U reach only columns c.. of the product
    const float* U = p.U + c * n + c;
    gemm({.m = n - c,
          .n = n - c,
          .k = std::min(kSlice, n - c),
          .alpha = 1,
          .A = U,
          .a_row = 1,
          .a_col = n,
          .B = U,
          .b_row = n,
          .b_col = 1,
          .C = p.out + c * n + c,
          .ldc = n,
          .part = cpu::Part::upper});
  }
  constexpr int64_t kTile = 32;  // two 4 KB tiles of the mirror image fit L1
  cpu::parallel_for((n + kTile - 1) / kTile, [&](int64_t t) {
    const int64_t i0 = t * kTile, i1 = std::min(n, i0 + kTile);
    for (int64_t j0 = 0; j0 < i1; j0 += kTile)
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t j = j0; j < std::min(i, j0 + kTile); ++j) p.out[i * n + j] = p.out[j * n + i];
  });
}

}  // namespace distaya

#endif
