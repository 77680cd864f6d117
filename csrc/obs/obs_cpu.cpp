// CPU sweep. Lanes are rows: E lies packed as [panel of kNR rows][column][kNR], which is both what
// the microkernel wants as its B operand and what the column loop vectorises over. Each block is an
// entry GEMM into a transposed tile (128 x kNR floats, in L1/L2) and the column loop on that tile;
// only an unstructured mask needs all panels' tiles at once, in between.
#include <bit>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "core/gemm.h"
#include "obs/obs.h"

#define DISTAYA_ISA_FILE "obs/obs_cpu.cpp"
#include "core/foreach_isa.h"

#ifdef DISTAYA_ISA_PASS
#include "core/microkernel.h"

namespace distaya::DISTAYA_ISA {
namespace {

using cpu::scratch;
using cpu::Scratch;

// Textual, in the order of use.
#include "obs/obs_tile.h"
//
#include "obs/obs_grid.h"
//
#include "obs/obs_select.h"
//
#include "obs/obs_among.h"
//
#include "obs/obs_sweep.h"

constexpr int64_t kDepth = 192;   // k slice: kNR columns of it (36 KB) stay in L1 for a whole tile
constexpr int64_t kTogether = 4;  // panels per task: a slice of P (96 KB, L2) serves all of them

// U = R_bb^-1 by back substitution in double, row by row from the bottom: [cols][kObsBlock].
void invert_block(const Obs& p, int64_t i1, int64_t n, double* U) {
  for (int64_t i = n - 1; i >= 0; --i) {
    const float* r = p.R + (i1 + i) * p.cols + i1;
    double* row = U + i * kObsBlock;
    std::fill(row, row + kObsBlock, 0.0);
    for (int64_t k = i + 1; k < n; ++k) {
      const double factor = r[k];
      const double* below = U + k * kObsBlock;
      for (int64_t j = k; j < n; ++j) row[j] -= factor * below[j];
    }
    row[i] = 1;
    const double inverse = 1.0 / r[i];
    for (int64_t j = i; j < n; ++j) row[j] *= inverse;
  }
}

// P_b = R[:i1, b] U_b -> [tiles][i1][kMR]; rows: scratch [i1][kHeight].
void pack_panel_factor(const Obs& p, const Block& b, const float* U, float* rows, float* P) {
  constexpr int64_t kChunk = 512;
  std::memset(rows, 0, sizeof(float) * static_cast<size_t>(b.i1 * kHeight));
  cpu::Gemm g{};
  g.m = b.i1, g.n = g.k = b.cols, g.alpha = 1;
  g.A = p.R + b.i1, g.a_row = p.cols, g.a_col = 1;
  g.B = U, g.b_row = kObsBlock, g.b_col = 1;
  g.C = rows, g.ldc = kHeight;
  cpu::gemm(g);
  cpu::parallel_for((b.i1 + kChunk - 1) / kChunk, [&](int64_t chunk) {
    const int64_t end = std::min(b.i1, (chunk + 1) * kChunk);
    for (int64_t t = 0; t < b.tiles; ++t)
      for (int64_t k = chunk * kChunk; k < end; ++k)
        std::memcpy(P + (t * b.i1 + k) * kMR, rows + k * kHeight + t * kMR, sizeof(float) * kMR);
  });
}

// N_b and D of a block, U_b = N_b / r in float.
void invert(const Obs& p, Block& b, float* U32) {
  const auto U = scratch<double>(kObsBlock * kObsBlock);
  std::fill(U.get(), U.get() + kObsBlock * kObsBlock, 0.0);
  invert_block(p, b.i1, b.cols, U.get());
  std::memset(b.N, 0, sizeof b.N);
  for (int64_t k = 0; k < b.cols; ++k) {
    const double r = p.R[(b.i1 + k) * p.cols + b.i1 + k];
    b.D[k] = static_cast<float>(r * r);
    for (int64_t j = k; j < b.cols; ++j)
      b.N[((j / kMR) * kObsBlock + k) * kMR + j % kMR] =
          static_cast<float>(-r * U[k * kObsBlock + j]);
  }
  for (int64_t i = 0; i < kObsBlock * kObsBlock; ++i) U32[i] = static_cast<float>(U[i]);
}

// The sweep's state over blocks and how one block runs.
template <class T>
struct Sweep {
  const Obs& p;
  T* W = static_cast<T*>(p.W);
  int64_t panels = (p.rows + kNR - 1) / kNR;
  Scratch<float> E = scratch<float>(panels * p.cols * kNR);  // [panels][cols][kNR]

  int64_t rows_of(int64_t panel) const { return std::min<int64_t>(kNR, p.rows - panel * kNR); }

  float* E_of(int64_t panel, int64_t column) const {
    return E.get() + (panel * p.cols + column) * kNR;
  }

  // T = W0[:, b] + E[:, :i1] P_b of `count` panels, [count][tiles * kMR][kNR]; W0 goes to E[:, b].
  void enter(const Block& b, int64_t first, int64_t count, float* tiles) const {
    const int64_t height = b.tiles * kMR;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t panel = first + i;
      float* tile = tiles + i * height * kNR;
      load_tile(W + panel * kNR * p.cols + b.i1, p.cols, rows_of(panel), b.cols, height, tile);
      std::memcpy(E_of(panel, b.i1), tile, sizeof(float) * static_cast<size_t>(b.cols * kNR));
    }
    for (int64_t k = 0; k < b.i1; k += kDepth) {
      const int64_t depth = std::min(kDepth, b.i1 - k);
      for (int64_t i = 0; i < count; ++i) {
        const bool last = i + 1 == count;
        const float* next = last ? E_of(first, k + depth) : E_of(first + i + 1, k);
        const int64_t share = depth * kNR / b.tiles;
        for (int64_t t = 0; t < b.tiles; ++t) {
          for (int64_t at = t * share; at < (t + 1) * share; at += 16)
            __builtin_prefetch(next + at, 0, 2);
          microkernel(depth, b.P + (t * b.i1 + k) * kMR, E_of(first + i, k),
                      tiles + (i * height + t * kMR) * kNR, kNR);
        }
      }
    }
  }

  // The column loop of one panel (x.keep set if unstructured); its results go out row-major.
  void leave(const Block& b, int64_t panel, float* tile, Panel& x) const {
    x.rows = rows_of(panel);
    x.row0 = panel * kNR;
    x.T = tile;
    x.E = E_of(panel, b.i1);
    const int64_t at = x.row0 * p.cols + b.i1;
    auto* mask = reinterpret_cast<uint8_t*>(p.mask) + at;
    if (p.select == Select::given) load_tile(mask, p.cols, x.rows, b.cols, b.cols, x.keep);
    const bool masked = p.select != Select::none, rounded = p.grid.bits != 0;
    if (masked && rounded)
      sweep_block<true, true>(p, b, x);
    else if (masked)
      sweep_block<true, false>(p, b, x);
    else
      sweep_block<false, true>(p, b, x);
    store_tile(x.Q, x.rows, b.cols, W + at, p.cols);
    if (rounded) store_tile(x.codes, x.rows, b.cols, p.codes + at, p.cols);
    if (masked && p.select != Select::given) store_tile(x.keep, x.rows, b.cols, mask, p.cols);
    for (int64_t i = 0; i < x.rows; ++i) p.loss[x.row0 + i] += 0.5 * x.loss[i];
  }

  template <class Body>
  void each_group(const Body& body) const {  // body(first panel, count)
    cpu::parallel_for((panels + kTogether - 1) / kTogether, [&](int64_t i) {
      body(i * kTogether, std::min(kTogether, panels - i * kTogether));
    });
  }

  void fused_block(const Block& b) const {
    each_group([&](int64_t first, int64_t count) {
      const int64_t size = b.tiles * kMR * kNR;
      const auto tiles = scratch<float>(count * size);
      enter(b, first, count, tiles.get());
      Panel x;
      for (int64_t i = 0; i < count; ++i) leave(b, first + i, tiles.get() + i * size, x);
    });
  }

  // One threshold over all rows lies between entry and column loop; tiles: room for all panels.
  void unstructured_block(const Block& b, float* tiles) const {
    const int64_t size = b.tiles * kMR * kNR;
    each_group([&](int64_t first, int64_t count) { enter(b, first, count, tiles + first * size); });
    const Entry entry{tiles, b.D, p.rows, b.cols, b.tiles * kMR};
    const int64_t k = prune_count(p, b.i1, b.i1 + b.cols);
    const Cut cut = k <= 0    ? Cut{}
                    : p.among ? find_cut_among(entry, k, *p.among)
                              : find_cut(entry, k);
    cpu::parallel_for(panels, [&](int64_t panel) {
      Panel x;
      apply_cut(entry, panel, cut, p.reference, x.keep);
      leave(b, panel, tiles + panel * size, x);
    });
  }

  void run() const {
    std::fill(p.loss, p.loss + p.rows, 0.0);
    const bool global = p.select == Select::unstructured;
    const auto tiles = scratch<float>(global ? panels * kHeight * kNR : 0);
    const auto P = scratch<float>(2 * p.cols * kHeight), U = scratch<float>(kObsBlock * kObsBlock);
    const auto block = std::make_unique<Block>();
    Block& b = *block;
    const int64_t width = block_columns(p);
    for (b.i1 = 0; b.i1 < p.cols; b.i1 += width) {
      cpu::check_interrupt();
      b.cols = std::min(width, p.cols - b.i1);
      b.tiles = (b.cols + kMR - 1) / kMR;
      b.P = P.get();
      if (p.rows > 0) {  // a rank without rows only takes part in the counts
        invert(p, b, U.get());
        pack_panel_factor(p, b, U.get(), P.get() + p.cols * kHeight, P.get());
      }
      if (global)
        unstructured_block(b, tiles.get());
      else
        fused_block(b);
    }
  }
};

// RTN of one panel: a grid per group of columns, then codes and rounded weights if asked for.
template <class T>
void quantize_panel(const Quantize& p, int64_t panel, float* tile, uint8_t* codes) {
  const int64_t row0 = panel * kNR, rows = std::min<int64_t>(kNR, p.rows - row0);
  const vf top = splat(static_cast<float>((1 << p.grid.bits) - 1));
  Grids grids;
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t n = std::min(p.group, p.cols - g * p.group), at = row0 * p.cols + g * p.group;
    T* W = static_cast<T*>(p.W) + at;
    load_tile(W, p.cols, rows, n, n, tile);
    make_grids(p.grid, tile, n, grids);
    write_grids(grids, rows, p.groups, p.scales + row0 * p.groups + g,
                p.zeros + row0 * p.groups + g);
    if (!p.codes) continue;
    for (int64_t at = 0; at < n * kNR; at += kLanes) {
      const vf scale = load(grids.scale + at % kNR), zero = load(grids.zero + at % kNR);
      const vf code = code_of(load(tile + at), scale, zero, top);
      store(codes + at, code);
      store(tile + at, scale * (code - zero));
    }
    store_tile(tile, rows, n, W, p.cols);
    store_tile(codes, rows, n, p.codes + at, p.cols);
  }
}

}  // namespace

void obs(const Obs& p) {
  dispatch<float, bf16, f16>(p.dtype, "W", [&]<class T>() { Sweep<T>{p}.run(); });
}

void quantize(const Quantize& p) {
  dispatch<float, bf16, f16>(p.dtype, "W", [&]<class T>() {
    const int64_t width = std::min(p.group, p.cols);
    cpu::parallel_for((p.rows + kNR - 1) / kNR, [&](int64_t panel) {
      const auto tile = scratch<float>(width * kNR);
      const auto codes = scratch<uint8_t>(p.codes ? width * kNR : 0);
      quantize_panel<T>(p, panel, tile.get(), codes.get());
    });
  });
}

}  // namespace distaya::DISTAYA_ISA

#else

namespace distaya {

void obs_cpu(const Obs& p) {
  switch (cpu::isa()) {
    case cpu::Isa::avx512: return avx512::obs(p);
    case cpu::Isa::avx2: return avx2::obs(p);
    default: return portable::obs(p);
  }
}

void quantize_cpu(const Quantize& p) {
  switch (cpu::isa()) {
    case cpu::Isa::avx512: return avx512::quantize(p);
    case cpu::Isa::avx2: return avx2::quantize(p);
    default: return portable::quantize(p);
  }
}

}  // namespace distaya

#endif
