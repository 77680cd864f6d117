// The blocked OBS sweep on the device (obs.h has the formulas). Before the blocks: all N_b in one
// launch; before every few blocks: their panels P_b in one launch. Per block of columns: the panel
// product E P_b, where a mask is chosen over all rows its threshold (four launches), and the sweep.
// Nothing is allocated, copied to the host or waited for. Where the rows lie on several ranks, the
// threshold's launches leave their counts to others and three more take up those of all ranks.
#include "core/cuda.cuh"
#include "core/gemm.cuh"
#include "obs/obs.h"
#include "obs/obs_factor.cuh"
#include "obs/obs_grid.cuh"
#include "obs/obs_select.cuh"
#include "obs/obs_sweep.cuh"

namespace distaya {
namespace {

using namespace cuda;

// Blocks are wider than half of kObsBlock whatever groups they hold (block_columns).
int64_t most_blocks(int64_t cols) { return ceil_div<int64_t>(cols, kB / 2 + 1); }

// Panels made together: at most 64 MB of them, which for 4096 columns is all.
int64_t panels_together(int64_t cols) {
  const int64_t fit = (int64_t{1} << 24) / (cols * kB), all = most_blocks(cols);
  return fit < 1 ? 1 : fit < all ? fit : all;
}

// Device scratch, laid out once; every part starts at a multiple of 256 bytes.
struct Work {
  float* E;  // [rows, e_pitch] deviation from the original weights
  float* T;  // [rows, kB] E P, then weights on entry to the block
  float* P;  // [panels_together][cols, kB]
  float* N;  // [most_blocks][kPacked]
  float* D;  // [cols]
  SelectState* state;
  int64_t bytes;
};

// Rows of E start at multiples of 16 bytes, for the panel product.
int64_t e_pitch(int64_t cols) { return ceil_div<int64_t>(cols, 4) * 4; }

Work lay_out(void* base, int64_t rows, int64_t cols) {
  Work w{};
  if (rows == 0 || cols == 0) return w;
  Arena arena{base};
  w.E = arena.take<float>(rows * e_pitch(cols));
  w.T = arena.take<float>(rows * kB);
  w.P = arena.take<float>(panels_together(cols) * cols * kB);
  w.N = arena.take<float>(most_blocks(cols) * kPacked);
  w.D = arena.take<float>(cols);
  w.state = arena.take<SelectState>(1);
  w.bytes = arena.bytes;
  return w;
}

// Warps per thread block of the sweep. most: as many as the device's shared memory holds. used: as
// many as make one wave, since each block loads N_b, and two where there are rows for them: they
// cost each other nothing.
struct SweepWarps {
  int most = kMostWarps, used;

  explicit SweepWarps(int64_t rows) {
    int device = 0, processors = 1, room = 0;
    check_cuda(cudaGetDevice(&device));
    check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    check_cuda(cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    while (most > 1 && sweep_shared(most) > static_cast<size_t>(room)) --most;
    const int64_t share = ceil_div<int64_t>(rows, 32 * static_cast<int64_t>(processors));
    const int64_t waves = ceil_div<int64_t>(share, most);
    used = static_cast<int>(ceil_div(share, waves));
    if (used < 2 && most > 1 && rows > 32) used = 2;
  }
};

// P of blocks `first` and after it, as many as fit.
void make_panels(const Factor& f, const Work& work, int64_t first, cudaStream_t stream) {
  const int64_t blocks = ceil_div(f.cols, f.step), together = panels_together(f.cols);
  const int64_t count = blocks - first < together ? blocks - first : together;
  const int64_t most = (first + count - 1) * f.step;  // rows above the last of them
  if (most == 0) return;
  const dim3 grid(grid_of(ceil_div<int64_t>(most, kPanelRows)), grid_of(count));
  launch(panel_kernel, grid, kPanelWarps * 32, kPanelShared, stream, f, first, work.P);
}

// T = E[:, :i1] P_b
void enter_block(const Obs& p, const Work& work, const float* P, int64_t i1, int width,
                 cudaStream_t stream) {
  gemm({.m = p.rows,
        .n = width,
        .k = i1,
        .alpha = 1.f,
        .A = work.E,
        .a_row = e_pitch(p.cols),
        .a_col = 1,
        .B = P,
        .b_row = kB,
        .b_col = 1,
        .C = work.T,
        .ldc = kB,
        .overwrite = true,
        .m_all = all_rows(p)},
       stream);
}

template <class T>
void run(const Obs& p, cudaStream_t stream) {
  const Work work = lay_out(p.work, p.rows, p.cols);
  const Factor f{p.R, p.cols, block_columns(p), work.N, work.D};
  const int64_t together = panels_together(p.cols);
  const SweepWarps choice(p.rows);
  const int warps = choice.used;
  const unsigned sweep_blocks = grid_of(ceil_div<int64_t>(p.rows, 32 * warps));
  need_shared(panel_kernel, kPanelShared);
  // The most, not what is used: another thread of the host may be about to launch more than that.
  need_shared(sweep_kernel<T>, static_cast<int>(sweep_shared(choice.most)));
  launch(invert_kernel, grid_of(ceil_div(p.cols, f.step)), kInvertThreads, 0, stream, f);
  if (p.select == Select::unstructured)
    launch(start_select_kernel, 1, kSelectThreads, 0, stream, work.state);
  for (int64_t i1 = 0, index = 0; i1 < p.cols; i1 += f.step, ++index) {
    const int width = static_cast<int>(p.cols - i1 < f.step ? p.cols - i1 : f.step);
    if (index % together == 0) make_panels(f, work, index, stream);
    enter_block(p, work, work.P + index % together * p.cols * kB, i1, width, stream);
    const int64_t k = p.select == Select::unstructured ? prune_count(p, i1, i1 + width) : 0;
    if (k > 0)
      select_block<T>(
          {.T = work.T,
           .W = p.W,
           .D = work.D + i1,
           .rows = p.rows,
           .cols = p.cols,
           .i1 = i1,
           .width = width,
           .k = k,
           .all_ties = p.reference,
           .state = work.state,
           .counts = p.among ? reinterpret_cast<Count*>(p.among->own) : work.state->counts,
           .theirs = p.among ? reinterpret_cast<Count*>(p.among->all) : nullptr,
           .rank = p.among ? p.among->rank : 0,
           .world = p.among ? p.among->world : 1},
          p, stream);
    const Block block{.N = work.N + index * kPacked,
                      .D = work.D + i1,
                      .T = work.T,
                      .entered = k > 0,
                      .E = work.E,
                      .e_pitch = e_pitch(p.cols),
                      .i1 = i1,
                      .width = width,
                      .cut = k > 0 ? work.state : nullptr};
    launch(sweep_kernel<T>, sweep_blocks, static_cast<unsigned>(32 * warps), sweep_shared(warps),
           stream, p, block);
  }
}

// What a rank without rows owes the others: its counts, which stay zero.
void take_part(const Obs& p) {
  const int64_t step = block_columns(p);
  for (int64_t i1 = 0; i1 < p.cols; i1 += step) {
    if (prune_count(p, i1, i1 + step < p.cols ? i1 + step : p.cols) <= 0) continue;
    for (int pass = 0; pass < kPasses; ++pass) exchange(p, pass);
  }
}

}  // namespace

int64_t obs_work_cuda(int64_t rows, int64_t cols) { return lay_out(nullptr, rows, cols).bytes; }

void obs_cuda(const Obs& p, Stream stream) {
  const DeviceGuard guard(p.device);
  if (p.rows == 0) return take_part(p);
  dispatch<float, f16, bf16>(p.dtype, "W", [&]<class T>() { run<T>(p, raw(stream)); });
}

void quantize_cuda(const Quantize& p, Stream stream) {
  if (p.rows == 0 || p.cols == 0) return;
  const DeviceGuard guard(p.device);
  const int64_t items = p.rows * p.groups;
  dispatch<float, f16, bf16>(p.dtype, "W", [&]<class T>() {
    launch(quantize_kernel<T>, grid_of(ceil_div<int64_t>(items, kQuantizeWarps)),
           kQuantizeWarps * 32, 0, raw(stream), p);
  });
}

}  // namespace distaya
