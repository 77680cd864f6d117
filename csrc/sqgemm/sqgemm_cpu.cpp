#include <bit>

#include "sqgemm/sqgemm.h"

#define DISTAYA_ISA_FILE "sqgemm/sqgemm_cpu.cpp"
#include "core/foreach_isa.h"

#ifdef DISTAYA_ISA_PASS
#include "core/activation.h"

namespace distaya::DISTAYA_ISA {
namespace {

using sqgemm::Activation;
using sqgemm::Problem;

// clang-format off
#include "sqgemm/decode.h"
#include "sqgemm/activations.h"
#include "sqgemm/int8.h"
#include "sqgemm/exact_operands.h"
#include "sqgemm/exact.h"
#include "sqgemm/epilogue.h"
// clang-format on

// Tokens of a task. Their sums (twice for a GLU) stay in L2 while the columns go by. A matrix of
// few rows is cut finer, so that there is work for many threads; how fine depends on the sizes
// alone, or results would depend on the number of threads.
constexpr int64_t kMostTokens = 256, kFewestTokens = 48, kWantedTasks = 64;

int64_t tokens_per_task(const Problem& p) {
  const int64_t wanted = (p.tokens * p.format.row_tiles() + kWantedTasks - 1) / kWantedTasks;
  const int64_t even = (wanted + kFewestTokens - 1) / kFewestTokens * kFewestTokens;
  return std::clamp(even, kFewestTokens, kMostTokens);
}

// Consecutive tasks that a thread takes at once: with few tokens the kernels ask for memory two
// tiles ahead, and at the end of a run of tasks that is memory which another thread will use.
int64_t tasks_at_once(const Problem& p, int64_t tasks) {
  constexpr int64_t kRun = 1 << 20;  // bytes of weights
  const int64_t each = std::max<int64_t>(1, p.format.col_tiles() * p.format.record_bytes());
  return std::clamp<int64_t>(kRun / each, 1, std::max<int64_t>(1, tasks / 32));
}

// Rows(buffer, row_tile, t0, t1, C) computes the sums of 64 rows for the tokens [t0, t1).
template <class Rows>
void each_tile(const Problem& p, const Rows& rows) {
  const int64_t step = tokens_per_task(p), blocks = (p.tokens + step - 1) / step;
  const int64_t tasks = p.format.row_tiles() * blocks, run = tasks_at_once(p, tasks);
  const auto one = [&](int64_t task) {
    alignas(64) float sums[2][kMostTokens * kTileRows];
    // Token blocks outermost: the activations of one stay in the cache while all rows go by.
    const int64_t tile = task % p.format.row_tiles(), t0 = task / p.format.row_tiles() * step;
    const int64_t t1 = std::min(p.tokens, t0 + step);
    rows(p.weights, tile, t0, t1, sums[0]);
    if (p.up) rows(p.up, tile, t0, t1, sums[1]);
    dispatch<float, f16, bf16>(p.dtype, "x",
                               [&]<class T>() { finish<T>(p, tile, t0, t1, sums[0], sums[1]); });
  };
  cpu::parallel_for((tasks + run - 1) / run, [&](int64_t i) {
    for (int64_t task = i * run; task < std::min(tasks, (i + 1) * run); ++task) one(task);
  });
}

}  // namespace

void sqgemm_run(const Problem& p) {
  using Bytes = const uint8_t*;
  if (p.exact) {
    const exact::Activations x(p);
    each_tile(p, [&](Bytes buffer, int64_t tile, int64_t t0, int64_t t1, float* C) {
      exact::rows(p.format, buffer, tile, x, t0, t1, C);
    });
  } else {
    Quantized x;
    quantize_activations(p.format, p.x, p.dtype, p.tokens, x);
    each_tile(p, [&](Bytes buffer, int64_t tile, int64_t t0, int64_t t1, float* C) {
      int8_rows(p.format, buffer, tile, x, t0, t1, C);
    });
  }
}

}  // namespace distaya::DISTAYA_ISA

#else

namespace distaya::sqgemm {

void run_cpu(const Problem& p) {
  switch (cpu::isa()) {
    case cpu::Isa::avx512: return avx512::sqgemm_run(p);
    case cpu::Isa::avx2: return avx2::sqgemm_run(p);
    default: return portable::sqgemm_run(p);
  }
}

}  // namespace distaya::sqgemm

#endif
