#include "core/gemm.h"

#define DISTAYA_ISA_FILE "core/gemm_cpu.cpp"
#include "core/foreach_isa.h"

#ifdef DISTAYA_ISA_PASS
#include "core/microkernel.h"

namespace distaya::DISTAYA_ISA {
namespace {

using cpu::Gemm;
using cpu::Part;

constexpr int64_t kKC = 384;       // depth of a packed slice: an A tile (12 KB) stays in L1
constexpr int64_t kMC = kMR * 16;  // rows of A packed by a thread at once (192 KB, half of L2)
constexpr int64_t kNC = kNR * 64;  // columns of B packed together (4.7 MB, shared L3)

// A[i0.., p0..] -> [tiles of kMR rows][k][kMR], alpha applied, short tiles padded with zeros.
void pack_a(const Gemm& g, int64_t i0, int64_t m, int64_t p0, int64_t k, float* out) {
  for (int64_t i = 0; i < m; i += kMR) {
    const int64_t rows = std::min<int64_t>(kMR, m - i);
    const float* src = g.A + (i0 + i) * g.a_row + p0 * g.a_col;
    for (int64_t p = 0; p < k; ++p, out += kMR) {
      for (int64_t r = 0; r < rows; ++r) out[r] = g.alpha * src[r * g.a_row + p * g.a_col];
      for (int64_t r = rows; r < kMR; ++r) out[r] = 0;
    }
  }
}

// One tile of kNR columns of B -> [k][kNR], padded with zeros.
void pack_b_tile(const Gemm& g, int64_t p0, int64_t k, int64_t j0, float* out) {
  const int64_t cols = std::min<int64_t>(kNR, g.n - j0);
  const float* src = g.B + p0 * g.b_row + j0 * g.b_col;
  if (cols < kNR) std::memset(out, 0, sizeof(float) * static_cast<size_t>(k) * kNR);
  if (g.b_col == 1) {
    for (int64_t p = 0; p < k; ++p)
      std::memcpy(out + p * kNR, src + p * g.b_row, sizeof(float) * static_cast<size_t>(cols));
  } else {
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t p = 0; p < k; ++p) out[p * kNR + j] = src[p * g.b_row + j * g.b_col];
  }
}

// Tile at (i, j) of C; a tile that sticks out of C goes through a full-size copy.
void tile(const Gemm& g, int64_t i, int64_t j, int64_t k, const float* A, const float* B) {
  const int64_t rows = std::min<int64_t>(kMR, g.m - i), cols = std::min<int64_t>(kNR, g.n - j);
  float* C = g.C + i * g.ldc + j;
  if (rows == kMR && cols == kNR) return microkernel(k, A, B, C, g.ldc);
  alignas(64) float part[kMR * kNR] = {};
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(part + r * kNR, C + r * g.ldc, sizeof(float) * static_cast<size_t>(cols));
  microkernel(k, A, B, part, kNR);
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(C + r * g.ldc, part + r * kNR, sizeof(float) * static_cast<size_t>(cols));
}

// Rows [i0, i0 + m) against all packed columns [j0, j0 + n) of one k slice.
void stripe(const Gemm& g, int64_t i0, int64_t p0, int64_t k, int64_t j0, int64_t n,
            const float* B) {
  const int64_t m = std::min(kMC, g.m - i0);
  if (g.part == Part::upper && i0 >= j0 + n) return;
  const auto A = cpu::scratch<float>(kMC * kKC);
  pack_a(g, i0, m, p0, k, A.get());
  for (int64_t j = 0; j < n; j += kNR)
    for (int64_t i = 0; i < m; i += kMR) {
      if (g.part == Part::upper && i0 + i >= j0 + j + kNR) continue;
      tile(g, i0 + i, j0 + j, k, A.get() + i * k, B + j * k);
    }
}

}  // namespace

void gemm(const Gemm& g) {
  if (g.m <= 0 || g.n <= 0 || g.k <= 0) return;
  const int64_t width = std::min(kNC, (g.n + kNR - 1) / kNR * kNR);
  const auto B = cpu::scratch<float>(width * std::min(kKC, g.k));
  for (int64_t j0 = 0; j0 < g.n; j0 += kNC) {
    const int64_t n = std::min(kNC, g.n - j0);
    for (int64_t p0 = 0; p0 < g.k; p0 += kKC) {
      const int64_t k = std::min(kKC, g.k - p0);
      cpu::parallel_for((n + kNR - 1) / kNR, [&](int64_t t) {
        pack_b_tile(g, p0, k, j0 + t * kNR, B.get() + t * kNR * k);
      });
      cpu::parallel_for((g.m + kMC - 1) / kMC,
                        [&](int64_t t) { stripe(g, t * kMC, p0, k, j0, n, B.get()); });
    }
  }
}

}  // namespace distaya::DISTAYA_ISA

#else

namespace distaya::cpu {

void gemm(const Gemm& g) {
  switch (isa()) {
    case Isa::avx512: return avx512::gemm(g);
    case Isa::avx2: return avx2::gemm(g);
    default: return portable::gemm(g);
  }
}

}  // namespace distaya::cpu

#endif
