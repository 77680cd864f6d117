// The door: shapes -> checks -> struct -> CPU or CUDA.
#include "obs/obs.h"

#include <cmath>

namespace distaya {
namespace {

// A tensor that must be there, contiguous, on W's device and of the wanted shape.
template <class T, int N>
T* operand(const Tensor& t, const char* name, const std::array<int64_t, N>& wanted,
           const Tensor& W) {
  const auto shape = t.shape<N>(name);
  t.need_contiguous(name);
  same_device(W, "W", t, name);
  check(shape == wanted, name, " (", t, ") does not fit W (", W, ")");
  return t.as<T>(name);
}

template <class T, int N>
T* operand(const MaybeView& t, const char* name, const std::array<int64_t, N>& wanted,
           const Tensor& W) {
  check(t.has_value(), "this mode of obs needs ", name);
  return operand<T, N>(*t, name, wanted, W);
}

Dtype float_dtype(const Tensor& W) {
  dispatch<float, bf16, f16>(W.dtype, "W", []<class T>() {});
  W.need_contiguous("W");
  return W.dtype;
}

Select select_from(const std::string& name) {
  if (name == "none") return Select::none;
  if (name == "unstructured") return Select::unstructured;
  if (name == "nm") return Select::nm;
  if (name == "given") return Select::given;
  fail("select is '", name, "' but must be none, unstructured, nm or given");
}

Grid grid_from(const GridOptions& o) {
  check(o.bits >= 2 && o.bits <= 8, "bits must be 2 to 8, not ", o.bits);
  check(o.group >= 1, "a group must have at least 1 column, not ", o.group);
  Grid grid{.bits = static_cast<int>(o.bits),
            .symmetric = o.symmetric,
            .mse = o.mse,
            .scale_dtype = Dtype::f32};
  if (o.scale_dtype == "bfloat16")
    grid.scale_dtype = Dtype::bf16;
  else if (o.scale_dtype == "float16")
    grid.scale_dtype = Dtype::f16;
  else
    check(o.scale_dtype == "float32", "scale_dtype is '", o.scale_dtype,
          "' but must be float32, bfloat16 or float16");
  return grid;
}

void choose_mode(Obs& p, const ObsOptions& o) {
  p.select = select_from(o.select);
  p.sparsity = o.sparsity;
  p.reference = o.reference;
  p.n = o.n;
  p.m = o.m;
  check(p.select != Select::unstructured || (o.sparsity >= 0 && o.sparsity < 1),
        "sparsity must be at least 0 and below 1, not ", o.sparsity);
  check(p.select != Select::nm || (1 <= o.n && o.n <= o.m && o.m <= 32),
        "N:M must have 1 <= N <= M <= 32, not ", o.n, ":", o.m);
  check(p.select != Select::none || o.grid.bits,
        "there is nothing to do: neither pruning nor bits");
}

void quantise(Obs& p, const ObsOptions& o, const Tensor& W, const MaybeView& codes,
              const MaybeView& scales, const MaybeView& zeros, const MaybeView& group_of) {
  p.grid = grid_from(o.grid);
  p.group = o.grid.group;
  p.dynamic = o.dynamic;
  p.groups = (p.cols + p.group - 1) / p.group;
  p.codes = operand<uint8_t, 2>(codes, "codes", {p.rows, p.cols}, W);
  p.scales = operand<float, 2>(scales, "scales", {p.rows, p.groups}, W);
  p.zeros = operand<float, 2>(zeros, "zeros", {p.rows, p.groups}, W);
  if (group_of) {
    check(!p.dynamic, "group_of only goes with given scales");
    p.group_of = operand<int64_t, 1>(group_of, "group_of", {p.cols}, W);
  }
  const int64_t width = block_columns(p);
  check(width > 0, p.m, " inputs per N:M group and grids of ", p.group,
        " columns have no common block of at most ", kObsBlock, " columns");
}

}  // namespace

void obs(const Tensor& W, const Tensor& R, const MaybeView& mask, const MaybeView& codes,
         const MaybeView& scales, const MaybeView& zeros, const MaybeView& group_of,
         const Tensor& loss, const Tensor& work, const ObsOptions& options,
         const AmongOptions* among, const MaybeView& tables) {
  const auto [rows, cols] = W.shape<2>("W");
  Obs p{};
  p.rows = rows;
  p.cols = cols;
  p.dtype = float_dtype(W);
  p.W = W.data;
  p.device = W.device;
  p.R = operand<float, 2>(R, "R", {cols, cols}, W);
  p.loss = operand<double, 1>(loss, "loss", {rows}, W);
  choose_mode(p, options);
  if (p.select != Select::none) p.mask = operand<bool, 2>(mask, "mask", {rows, cols}, W);
  if (options.grid.bits) quantise(p, options, W, codes, scales, zeros, group_of);
  const int64_t bytes = obs_work(W);
  p.work = operand<uint8_t, 1>(work, "work", {bytes}, W);
  Among all{};
  if (among) {
    check(tables.has_value(), "rows that lie on several ranks need tables to exchange");
    all = read_among(*among, *tables, kBins, rows, W);
    if (all.world > 1) p.among = &all;
  }
  const bool idle = rows == 0 && !(p.among && p.select == Select::unstructured);
  if (idle || cols == 0) return;
  if constexpr (has_cuda)
    if (W.on_cuda) return obs_cuda(p, stream_of(W));
  obs_cpu(p);
}

int64_t obs_work(const Tensor& W) {
  const auto [rows, cols] = W.shape<2>("W");
  if constexpr (has_cuda)
    if (W.on_cuda) return obs_work_cuda(rows, cols);
  return 0;
}

void quantize(const Tensor& W, const MaybeView& codes, const Tensor& scales, const Tensor& zeros,
              const GridOptions& options) {
  const auto [rows, cols] = W.shape<2>("W");
  Quantize p{};
  p.rows = rows;
  p.cols = cols;
  p.dtype = float_dtype(W);
  p.W = W.data;
  p.device = W.device;
  p.grid = grid_from(options);
  p.group = options.group;
  p.groups = (cols + p.group - 1) / p.group;
  if (codes) p.codes = operand<uint8_t, 2>(codes, "codes", {rows, cols}, W);
  p.scales = operand<float, 2>(scales, "scales", {rows, p.groups}, W);
  p.zeros = operand<float, 2>(zeros, "zeros", {rows, p.groups}, W);
  if (rows == 0 || cols == 0) return;
  if constexpr (has_cuda)
    if (W.on_cuda) return quantize_cuda(p, stream_of(W));
  quantize_cpu(p);
}

}  // namespace distaya
