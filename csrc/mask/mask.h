// Which weights stay: importance scores of a weight matrix W [rows, cols] (rows = outputs, cols =
// inputs, y = x W^T) and masks chosen from them.
//
//   magnitude  S_ij = |W_ij|
//   wanda      S_ij = |W_ij| * norm_j                             Sun et al. 2306.11695, section 3
//   ria        S_ij = (|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) * norm_j^power
//                                                          Zhang et al., ICLR 2024, section 3.2
//   keep_k     exactly k survivors in each row, each column or the whole matrix
//   keep_nm    n survivors in every m consecutive inputs (of a row) or outputs (of a column)
//
// Scores are ranked by their bits: a float becomes the integer sign * magnitude, whose order is the
// float's order and in which -0 and +0 are the same 0. Of equal scores the lower index stays.
// Selection compares and counts integers only, so a mask is the same on every machine.
//
// The k best of a matrix whose rows lie on several ranks are the same as in one process, and so is
// the NaN that is found: each digit of 8 bits of the cut takes one exchange of 256 counts and the
// place of the first NaN, so that a rank gives 4 * 257 * 8 = 8224 bytes per selection and gets as
// many from each of the others. The last table also holds how many ties each rank has.
#pragma once

#include <cstdint>
#include <string>

#include "core/among.h"
#include "core/tensor.h"

namespace distaya::mask {

enum class Along { row, column, matrix };

struct Score {
  const void* W;  // fp32 | f16 | bf16 [rows, cols]
  Dtype dtype;
  int64_t rows, cols;
  const float* norms;  // [cols], null for magnitude
  double power;        // of the norms, RIA only
  double* work;        // fp64 [score_work(rows, cols)], RIA only; null otherwise
  float* S;            // [rows, cols]
};

// RIA's workspace: 1 / sum of each row, 1 / sum of each column, norm^power, and partial column sums
// of bands of rows. Bands depend on the shape alone: sums have one order however many threads run.
constexpr int64_t kBands = 64;

constexpr int64_t score_work(int64_t rows, int64_t cols) { return rows + cols * (2 + kBands); }

// int64 of `work` that the k best along this need: 0 but for a whole matrix on CUDA.
int64_t keep_work(const Tensor& scores, const std::string& along);

constexpr int64_t kTable = 256 + 1;  // what is exchanged: counts of a digit, lowest NaN or -1

struct KeepK {
  const float* scores;  // [rows, cols]
  int64_t rows, cols;
  int64_t k;  // survivors per group
  Along along;
  uint8_t* mask;  // [rows, cols], written as 0 / 1
  int64_t* bad;   // [1], -1 on entry: lowest flat index of a NaN, if any
  int64_t* work;  // CUDA and Along::matrix only: [kKeepWork]
  const Among* among =
      nullptr;  // Along::matrix only, null: all rows are here. Else `rows` are this
                // rank's and may be 0, k and *bad are those of the whole matrix
};

// Contiguous chunks of the matrix whose ties are counted apart, after a histogram and a few words.
constexpr int64_t kChunks = 4096;
constexpr int64_t kKeepWork = kChunks + 256 + 8;

struct KeepNM {
  const float* scores;  // [rows, cols]
  int64_t rows, cols;
  int n, m;         // 1 <= n < m <= 32
  bool of_outputs;  // groups run down a column instead of along a row
  uint8_t* mask;
  int64_t* bad;
};

void score_cpu(const Score& p);
void score_cuda(const Score& p, int device, Stream stream);
void keep_k_cpu(const KeepK& p);
void keep_k_cuda(const KeepK& p, int device, Stream stream);
void keep_nm_cpu(const KeepNM& p);
void keep_nm_cuda(const KeepNM& p, int device, Stream stream);

}  // namespace distaya::mask

namespace distaya {

// The doors. method: magnitude | wanda | ria. along: row | column | matrix, or inputs | outputs.
// tables: int64 [1 + world, mask::kTable], goes with among.
void mask_score(const Tensor& W, const std::string& method, const Tensor* norms, double power,
                const Tensor* work, const Tensor& S);
void mask_keep_k(const Tensor& scores, int64_t k, const std::string& along, const Tensor& mask,
                 const Tensor& bad, const Tensor* work, const AmongOptions* among,
                 const Tensor* tables);
void mask_keep_nm(const Tensor& scores, int64_t n, int64_t m, const std::string& along,
                  const Tensor& mask, const Tensor& bad);

}  // namespace distaya
