// The doors: shapes -> checks -> struct -> CPU or CUDA.
#include "refit/refit.h"

#include <cmath>

namespace distaya {
namespace {

// A contiguous tensor on the device of `like`, of the wanted shape.
template <class T, int N>
T* operand(const Tensor& t, const char* name, const std::array<int64_t, N>& wanted,
           const Tensor& like, const char* like_name) {
  const auto shape = t.shape<N>(name);
  t.need_contiguous(name);
  same_device(like, like_name, t, name);
  check(shape == wanted, name, " (", t, ") does not fit ", like_name, " (", like, ")");
  return t.as<T>(name);
}

// The same for one of the three floats.
void* weights(const Tensor& t, const char* name, const std::array<int64_t, 2>& wanted,
              const Tensor& like, const char* like_name) {
  void* data = nullptr;
  dispatch<float, bf16, f16>(
      t.dtype, name, [&]<class T>() { data = operand<T, 2>(t, name, wanted, like, like_name); });
  return data;
}

int64_t rows_of_all(int64_t all_rows, int64_t rows) {
  check(all_rows == 0 || all_rows >= rows, rows, " rows cannot be some of ", all_rows);
  return all_rows ? all_rows : rows;
}

}  // namespace

void refit(const Tensor& target, const Tensor& mask, const Tensor& H,
           const std::optional<Tensor>& start, double damp, int64_t iterations, const Tensor& out,
           const Tensor& before, const Tensor& after, const Tensor& work, int64_t all_rows) {
  const auto [rows, cols] = out.shape<2>("W");
  check(std::isfinite(damp) && damp >= 0, "damp must be a finite number >= 0 but is ", damp);
  check(iterations >= 0, "iterations must be at least 0 but are ", iterations);
  Refit p{};
  p.rows = rows, p.cols = cols;
  p.all_rows = rows_of_all(all_rows, rows);
  p.damp = damp, p.iterations = iterations;
  p.out = weights(out, "W", {rows, cols}, out, "W");
  p.dtype = out.dtype;
  p.target = weights(target, "target", {rows, cols}, out, "W");
  p.target_dtype = target.dtype;
  p.mask = operand<bool, 2>(mask, "mask", {rows, cols}, out, "W");
  p.H = operand<float, 2>(H, "H", {cols, cols}, out, "W");
  if (start) p.start = operand<float, 2>(*start, "start", {rows, cols}, out, "W");
  p.before = operand<double, 1>(before, "before", {rows}, out, "W");
  p.after = operand<double, 1>(after, "after", {rows}, out, "W");
  const int64_t bytes = refit_work(out);
  p.work = operand<uint8_t, 1>(work, "work", {bytes}, out, "W");
  p.device = out.device;
  if (rows == 0) return;
  if constexpr (has_cuda)
    if (out.on_cuda) return refit_cuda(p, stream_of(out));
  refit_cpu(p);
}

int64_t refit_work(const Tensor& out) {
  const auto [rows, cols] = out.shape<2>("W");
  if constexpr (has_cuda)
    if (out.on_cuda) return refit_work_cuda(rows, cols);
  return 0;
}

void admm(const Tensor& G, const Tensor& X, const Tensor& mask, const Tensor& Y,
          const Tensor& inverse, double rho, double ratio, int64_t all_rows) {
  const auto [rows, cols] = G.shape<2>("G");
  check(rho > 0 && std::isfinite(rho), "rho must be a finite number > 0 but is ", rho);
  check(ratio >= 0 && std::isfinite(ratio), "ratio must be a finite number >= 0 but is ", ratio);
  const Admm p{.rows = rows,
               .cols = cols,
               .G = operand<float, 2>(G, "G", {rows, cols}, G, "G"),
               .X = operand<float, 2>(X, "X", {rows, cols}, G, "G"),
               .mask = operand<bool, 2>(mask, "mask", {rows, cols}, G, "G"),
               .Y = operand<float, 2>(Y, "Y", {rows, cols}, G, "G"),
               .inverse = operand<float, 2>(inverse, "inverse", {cols, cols}, G, "G"),
               .rho = static_cast<float>(rho),
               .ratio = static_cast<float>(ratio),
               .all_rows = rows_of_all(all_rows, rows),
               .device = G.device};
  if (rows == 0 || cols == 0) return;
  if constexpr (has_cuda)
    if (G.on_cuda) return admm_cuda(p, stream_of(G));
  admm_cpu(p);
}

void multiply(const Tensor& C, const Tensor& X, const Tensor& B, int64_t all_rows) {
  const auto [rows, cols] = C.shape<2>("C");
  const Multiply p{.rows = rows,
                   .cols = cols,
                   .C = operand<float, 2>(C, "C", {rows, cols}, C, "C"),
                   .X = operand<float, 2>(X, "X", {rows, cols}, C, "C"),
                   .B = operand<float, 2>(B, "B", {cols, cols}, C, "C"),
                   .all_rows = rows_of_all(all_rows, rows),
                   .device = C.device};
  if (rows == 0 || cols == 0) return;
  check(C.data != X.data && C.data != B.data, "C must not be the memory of X or B");
  if constexpr (has_cuda)
    if (C.on_cuda) return multiply_cuda(p, stream_of(C));
  multiply_cpu(p);
}

}  // namespace distaya
