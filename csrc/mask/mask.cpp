#include "mask/mask.h"

namespace distaya {
namespace {

using mask::Along;

// Shape, dtype, layout and device of the outputs that belong to `like` [rows, cols].
template <class T>
T* output(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  const auto [rows, cols] = t.shape<2>(name);
  check(rows == like.sizes[0] && cols == like.sizes[1], name, " (", t, ") must have the shape of ",
        like_name, " (", like, ")");
  t.need_contiguous(name);
  same_device(t, name, like, like_name);
  return t.as<T>(name);
}

int64_t* counter(const Tensor& bad, const Tensor& scores) {
  const auto [n] = bad.shape<1>("bad");
  check(n == 1, "bad must hold one counter but is ", bad);
  same_device(bad, "bad", scores, "scores");
  return bad.as<int64_t>("bad");
}

uint8_t* mask_bytes(const Tensor& mask, const Tensor& scores) {
  return reinterpret_cast<uint8_t*>(output<bool>(mask, "mask", scores, "scores"));
}

Along parse_along(const std::string& along) {
  if (along == "row") return Along::row;
  if (along == "column") return Along::column;
  if (along == "matrix") return Along::matrix;
  fail("along is '", along, "' but must be row, column or matrix");
}

}  // namespace

void mask_score(const Tensor& W, const std::string& method, const Tensor* norms, double power,
                const Tensor* work, const Tensor& S) {
  const auto [rows, cols] = W.shape<2>("W");
  W.need_contiguous("W");
  const bool ria = method == "ria", plain = method == "magnitude";
  check(ria || plain || method == "wanda", "the score '", method,
        "' must be magnitude, wanda or ria");
  mask::Score p{.W = W.data,
                .dtype = W.dtype,
                .rows = rows,
                .cols = cols,
                .norms = nullptr,
                .power = power,
                .work = nullptr,
                .S = output<float>(S, "S", W, "W")};
  if (!plain) {
    check(norms != nullptr, "the score '", method, "' needs norms, one per column of W (", W, ")");
    const auto [n] = norms->shape<1>("norms");
    check(n == cols, "norms has ", n, " entries but W has ", cols, " columns (", W, ")");
    norms->need_contiguous("norms");
    same_device(*norms, "norms", W, "W");
    p.norms = norms->as<float>("norms");
  }
  if (ria) {
    check(work != nullptr, "the score 'ria' needs a workspace");
    const auto [n] = work->shape<1>("work");
    check(n >= mask::score_work(rows, cols), "work has ", n, " entries but W (", W, ") needs ",
          mask::score_work(rows, cols));
    work->need_contiguous("work");
    same_device(*work, "work", W, "W");
    p.work = work->as<double>("work");
  }
  if (rows == 0 || cols == 0) return;
  if constexpr (has_cuda)
    if (W.on_cuda) return mask::score_cuda(p, W.device, stream_of(W));
  mask::score_cpu(p);
}

int64_t mask::keep_work(const Tensor& scores, const std::string& along) {
  return scores.on_cuda && parse_along(along) == Along::matrix ? kKeepWork : 0;
}

void mask_keep_k(const Tensor& scores, int64_t k, const std::string& along, const Tensor& mask,
                 const Tensor& bad, const Tensor* work, const AmongOptions* among,
                 const Tensor* tables) {
  const auto [rows, cols] = scores.shape<2>("scores");
  scores.need_contiguous("scores");
  mask::KeepK p{.scores = scores.as<float>("scores"),
                .rows = rows,
                .cols = cols,
                .k = k,
                .along = parse_along(along),
                .mask = mask_bytes(mask, scores),
                .bad = counter(bad, scores),
                .work = nullptr};
  Among all{};
  if (among) {
    check(p.along == Along::matrix, "the k best of each ", along,
          " have nothing to do with rows on other ranks");
    check(tables != nullptr, "rows that lie on several ranks need tables to exchange");
    all = read_among(*among, *tables, mask::kTable, rows, scores);
    if (all.world > 1) p.among = &all;
  }
  const int64_t group = p.along == Along::row      ? cols
                        : p.along == Along::column ? rows
                        : p.among                  ? all.total * cols
                                                   : rows * cols;
  check(k >= 0 && k <= group, "cannot keep ", k, " of the ", group, " scores of a ", along, " (",
        scores, ")");
  check(p.along == Along::matrix || group <= INT32_MAX, "a ", along, " of ", group,
        " scores is longer than this kernel counts (", INT32_MAX, ")");
  if ((rows == 0 && !p.among) || cols == 0) return;
  if constexpr (has_cuda)
    if (scores.on_cuda) {
      if (p.along == Along::matrix) {
        check(work != nullptr && work->numel() >= mask::kKeepWork,
              "keeping k of a matrix on cuda needs a workspace of ", mask::kKeepWork, " int64");
        same_device(*work, "work", scores, "scores");
        p.work = work->as<int64_t>("work");
      }
      return mask::keep_k_cuda(p, scores.device, stream_of(scores));
    }
  mask::keep_k_cpu(p);
}

void mask_keep_nm(const Tensor& scores, int64_t n, int64_t m, const std::string& along,
                  const Tensor& mask, const Tensor& bad) {
  const auto [rows, cols] = scores.shape<2>("scores");
  scores.need_contiguous("scores");
  check(1 <= n && n < m && m <= 32, "N:M is ", n, ":", m, " but must satisfy 1 <= N < M <= 32");
  const bool of_outputs = along == "outputs";
  check(of_outputs || along == "inputs", "along is '", along, "' but must be inputs or outputs");
  const int64_t length = of_outputs ? rows : cols;
  check(length % m == 0, n, ":", m, " along the ", along, " needs a multiple of ", m, " but there ",
        "are ", length, " (scores ", scores, ")");
  const mask::KeepNM p{.scores = scores.as<float>("scores"),
                       .rows = rows,
                       .cols = cols,
                       .n = static_cast<int>(n),
                       .m = static_cast<int>(m),
                       .of_outputs = of_outputs,
                       .mask = mask_bytes(mask, scores),
                       .bad = counter(bad, scores)};
  if (rows == 0 || cols == 0) return;
  if constexpr (has_cuda)
    if (scores.on_cuda) return mask::keep_nm_cuda(p, scores.device, stream_of(scores));
  mask::keep_nm_cpu(p);
}

}  // namespace distaya
