#include "core/gemm.h"

#define DISTAYA_ISA_FILE "core/gemm_cpu.cpp"
#include "core/foreach_isa.h"

#ifdef DISTAYA_ISA_PASS
#include "core/microkernel.h"
#include "core/pack.h"

namespace distaya::DISTAYA_ISA {
namespace {

using cpu::Gemm;
using cpu::Part;

constexpr int64_t kKC = cpu::kGemmDepth;  // an A tile (12 KB) stays in L1, a B tile in L2
constexpr int64_t kMC = 128 / kMR * kMR;  // rows of A packed by a thread at once (192 KB, in L2)
constexpr int64_t kNC = 3072;             // columns of B packed together (4.7 MB, shared L3)
constexpr int64_t kGroup = cpu::kGemmInPlace / kNR;  // fewest B tiles worth packing A once more for
static_assert(kNC % kNR == 0 && cpu::kGemmInPlace % kNR == 0);

// Packing space, kept by each thread between calls: fresh pages cost more than packing does.
template <int kUse>
float* workspace(int64_t n) {
  thread_local cpu::Scratch<float> memory;
  thread_local int64_t size = 0;
  if (n > size) {
    memory.reset();
    memory = cpu::scratch<float>(n);
    size = n;
  }
  return memory.get();
}

// Tile at (i, j) of C; a tile that sticks out of C goes through a full-size copy.
template <bool kAdd>
void tile(const Gemm& g, int64_t i, int64_t j, int64_t k, const float* A, const float* B) {
  const int64_t rows = std::min<int64_t>(kMR, g.m - i), cols = std::min<int64_t>(kNR, g.n - j);
  float* C = g.C + i * g.ldc + j;
  if (rows == kMR && cols == kNR) return microkernel<kAdd>(k, A, B, C, g.ldc);
  alignas(64) float part[kMR * kNR];
  microkernel<false>(k, A, B, part, kNR);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c)
      C[r * g.ldc + c] = kAdd ? C[r * g.ldc + c] + part[r * kNR + c] : part[r * kNR + c];
}

// One k slice of the product: columns [j0, j0 + n) of C, packed as B.
struct Slice {
  int64_t p0, k, j0, n;
  const float* B;
  bool add;
};

// Rows [i0, i0 + kMC) against the slice's column tiles [from, to).
void stripe(const Gemm& g, const Slice& s, int64_t i0, int64_t from, int64_t to) {
  const int64_t m = std::min(kMC, g.m - i0), end = std::min(to, s.j0 + s.n);
  if (g.part == Part::upper && i0 >= end) return;
  float* A = workspace<0>(kMC * kKC);
  for (int64_t i = 0; i < m; i += kMR) {
    const float* from_row = g.A + (i0 + i) * g.a_row + s.p0 * g.a_col;
    pack<kMR>({from_row, g.a_row, g.a_col, std::min<int64_t>(kMR, m - i), s.k}, g.alpha,
              A + i * s.k);
  }
  for (int64_t j = from; j < end; j += kNR)
    for (int64_t i = 0; i < m; i += kMR) {
      if (g.part == Part::upper && i0 + i >= j + kNR) continue;
      const float* B = s.B + (j - s.j0) * s.k;
      if (s.add)
        tile<true>(g, i0 + i, j, s.k, A + i * s.k, B);
      else
        tile<false>(g, i0 + i, j, s.k, A + i * s.k, B);
    }
}

// Stripes are the tasks; a product of few rows is also cut along its columns.
void multiply(const Gemm& g, const Slice& s) {
  const int64_t stripes = (g.m + kMC - 1) / kMC, tiles = (s.n + kNR - 1) / kNR;
  const int64_t wanted = stripes >= 8 ? 1 : 8 / stripes;
  const int64_t group = std::max(kGroup, (tiles + wanted - 1) / wanted);
  const int64_t groups = (tiles + group - 1) / group;
  cpu::parallel_for(stripes * groups, [&](int64_t t) {
    const int64_t from = s.j0 + t % groups * group * kNR;
    stripe(g, s, t / groups * kMC, from, from + group * kNR);
  });
}

}  // namespace

void gemm(const Gemm& g) {
  if (g.m <= 0 || g.n <= 0 || g.k <= 0) return;
  const int64_t width = std::min(kNC, (g.n + kNR - 1) / kNR * kNR);
  float* B = workspace<1>(width * std::min(kKC, g.k));
  for (int64_t j0 = 0; j0 < g.n; j0 += kNC) {
    const int64_t n = std::min(kNC, g.n - j0);
    for (int64_t p0 = 0; p0 < g.k; p0 += kKC) {
      const int64_t k = std::min(kKC, g.k - p0);
      cpu::check_interrupt();
      cpu::parallel_for((n + kNR - 1) / kNR, [&](int64_t t) {
        const int64_t j = j0 + t * kNR;
        const float* from = g.B + p0 * g.b_row + j * g.b_col;
        pack<kNR>({from, g.b_col, g.b_row, std::min<int64_t>(kNR, g.n - j), k}, 1.0f,
                  B + t * kNR * k);
      });
      multiply(g, {p0, k, j0, n, B, g.add || p0 > 0});
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
