// The door of the cholesky room: shapes and types are checked here, once, for both devices.
#include "cholesky/cholesky.h"

#include <cmath>

namespace distaya {
namespace {

int64_t square(const Tensor& t, const char* name) {
  const auto [rows, cols] = t.shape<2>(name);
  check(rows == cols, name, " must be square but is ", rows, " x ", cols);
  t.need_contiguous(name);
  return rows;
}

// The two n x n operands of an out-of-place op.
int64_t pair(const Tensor& from, const char* from_name, const Tensor& to, const char* to_name) {
  const int64_t n = square(from, from_name);
  check(square(to, to_name) == n, to_name, " (", to, ") must have the shape of ", from_name, " (",
        from, ")");
  same_device(from, from_name, to, to_name);
  check(n == 0 || from.data != to.data, from_name, " and ", to_name,
        " must not be the same tensor");
  return n;
}

void vector(const Tensor& t, const char* name, int64_t least, const Tensor& H) {
  const auto [size] = t.shape<1>(name);
  check(size >= least, name, " must hold ", least, " elements but holds ", size);
  t.need_contiguous(name);
  same_device(t, name, H, "H");
}

}  // namespace

int64_t cholesky_work(const Tensor& H) {
  const auto [n, cols] = H.shape<2>("H");
  (void)cols;
  if constexpr (has_cuda)
    if (H.on_cuda) return cholesky_work_cuda(n);
  return 0;
}

void cholesky_(Tensor H, double damp, double floor, Tensor info, Tensor mean, Tensor work) {
  const int64_t n = square(H, "H");
  check(std::isfinite(damp) && damp >= 0, "damp must be a finite number >= 0 but is ", damp);
  check(std::isfinite(floor) && floor > 0, "floor must be a finite number > 0 but is ", floor);
  vector(info, "info", kInfo, H);
  vector(mean, "mean", 1, H);
  vector(work, "work", cholesky_work(H), H);
  const Cholesky p{.H = H.as<float>("H"),
                   .n = n,
                   .damp = damp,
                   .floor = floor,
                   .info = info.as<int64_t>("info"),
                   .mean = mean.as<double>("mean"),
                   .work = work.as<float>("work")};
  if constexpr (has_cuda)
    if (H.on_cuda) return cholesky_cuda(p, stream_of(H), H.device);
  cholesky_cpu(p);
}

void inverse_factor(Tensor R, Tensor U) {
  const int64_t n = pair(R, "R", U, "U");
  const InverseFactor p{.R = R.as<float>("R"), .U = U.as<float>("U"), .n = n};
  if constexpr (has_cuda)
    if (R.on_cuda) return inverse_factor_cuda(p, stream_of(R), R.device);
  inverse_factor_cpu(p);
}

void inverse(Tensor U, Tensor out) {
  const int64_t n = pair(U, "U", out, "out");
  const Inverse p{.U = U.as<float>("U"), .out = out.as<float>("out"), .n = n};
  if constexpr (has_cuda)
    if (U.on_cuda) return inverse_cuda(p, stream_of(U), U.device);
  inverse_cpu(p);
}

void solve_(Tensor B, Tensor R, int64_t all_rows) {
  const int64_t n = square(R, "R");
  const auto [rows, cols] = B.shape<2>("B");
  check(cols == n, "B (", B, ") must have as many columns as R (", R, ")");
  B.need_contiguous("B");
  same_device(B, "B", R, "R");
  check(rows == 0 || n == 0 || B.data != R.data, "B and R must not be the same tensor");
  check(all_rows == 0 || all_rows >= rows, rows, " rows cannot be some of ", all_rows);
  const Solve p{.B = B.as<float>("B"),
                .R = R.as<float>("R"),
                .rows = rows,
                .n = n,
                .all_rows = all_rows ? all_rows : rows};
  if (rows == 0 || n == 0) return;
  if constexpr (has_cuda)
    if (R.on_cuda) return solve_cuda(p, stream_of(R), R.device);
  solve_cpu(p);
}

}  // namespace distaya
