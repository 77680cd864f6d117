// Launches of the warpgroup kernel: activations put in order, the product, the splits added.
#include "core/check.h"
#include "sqgemm/launch.cuh"
#include "sqgemm/wgmma.cuh"

namespace distaya::sqgemm {
namespace {

using namespace cuda;

template <class T, bool sparse, int n>
void multiply(const PairLaunch& p, int device, cudaStream_t stream) {
  constexpr auto kernel = pair_kernel<T, sparse, n>;
  allow_shared<kernel>(device, kPairShared);
  const int64_t blocks = p.plan.row_blocks * p.plan.passes;
  check(blocks < int64_t{1} << 31, "x of ", p.out.tokens, " tokens by a weight of ", p.out.rows,
        " rows is too much for one launch");
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.plan.splits));
  cuda::launch<true>(kernel, grid, kPairThreads, static_cast<size_t>(p.plan.shared_bytes), stream,
                     p);
}

template <class T>
void run(const Problem& p, const PairLaunch& launch, cudaStream_t stream) {
  const PairPlan& plan = launch.plan;
  const bool sparse = p.format.kind == pack::Kind::int4_24;
  check(plan.passes < 65536, "x of ", p.tokens, " tokens is too much for one launch");
  if (plan.x_bytes > 0) {
    const dim3 grid(static_cast<unsigned>(p.format.col_tiles() * 2 * (plan.n / 32)),
                    static_cast<unsigned>(plan.passes));
    cuda::launch<true>(order_kernel<T>, grid, kOrderThreads, 0, stream, static_cast<const T*>(p.x),
                       p.tokens, p.format.cols, plan.n, sparse, static_cast<uint4*>(p.work));
  }
  if (plan.n == 64)
    sparse ? multiply<T, true, 64>(launch, p.device, stream)
           : multiply<T, false, 64>(launch, p.device, stream);
  else
    sparse ? multiply<T, true, 128>(launch, p.device, stream)
           : multiply<T, false, 128>(launch, p.device, stream);
  if (plan.splits == 1) return;
  const int64_t padded = p.format.row_tiles() * pack::kTileRows;
  add_splits<T>({launch.out, launch.partial, plan.splits, padded, plan.matrices}, stream);
}

}  // namespace

bool wgmma_device(int device) {
  const DeviceGuard guard(device);
  return capability() == 90;
}

int64_t wgmma_work_bytes(const pack::Format& format, int64_t tokens, bool glu) {
  const PairPlan plan = make_pair_plan(format, tokens, glu);
  return plan.x_bytes + plan.partial_bytes;
}

void run_wgmma(const Problem& p, Stream stream) {
  if (p.tokens == 0 || p.format.rows == 0) return;
  const DeviceGuard guard(p.device);
  PairLaunch launch{};
  launch.plan = make_pair_plan(p.format, p.tokens, p.up != nullptr);
  const int64_t wanted = launch.plan.x_bytes + launch.plan.partial_bytes;
  check(p.work_bytes >= wanted, "work has ", p.work_bytes, " bytes but this product needs ",
        wanted);
  for (const uint8_t* data : {p.weights, p.up})
    check(reinterpret_cast<uintptr_t>(data) % 16 == 0,
          "packed weights must begin at a multiple of ", "16 bytes");
  launch.out = {p.y, p.bias, p.up_bias, p.tokens, p.format.rows, p.act, p.up != nullptr};
  launch.format = p.format;
  launch.weights[0] = p.weights;
  launch.weights[1] = p.up;
  launch.x = static_cast<const uint8_t*>(p.work);
  launch.partial = reinterpret_cast<float*>(static_cast<uint8_t*>(p.work) + launch.plan.x_bytes);
  dispatch<f16, bf16>(p.dtype, "x", [&]<class T>() { run<T>(p, launch, raw(stream)); });
}

}  // namespace distaya::sqgemm
