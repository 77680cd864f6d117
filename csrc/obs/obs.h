// One blocked OBS sweep that prunes (SparseGPT), rounds (GPTQ) or does both, without H^-1.
//
// H' = R R^T, R upper. D = diag(R)^2, M = R / diag(R) (each column by its diagonal; unit upper), so
// H' = M D M^T. E = W0 - Q is the deviation from the ORIGINAL weights. Blocks b = [i1, i2) of
// columns, left to right; with r = diag(R_bb), U_b = R_bb^-1, N_b = M_bb^-1 = r (row-wise) U_b:
//
//   P_b = M[:i1, b] N_b = R[:i1, b] U_b               [i1, 128]
//   T   = W0[:, b] + E[:, :i1] P_b                    the weights SparseGPT has on entry to b
//   for j in b:  score = T[:, j:]^2 D[j:]             exact OBS cost, where a mask is chosen
//                q = T[:, j] pruned and / or rounded;  g = T[:, j] - q
//                loss += 1/2 g^2 D_j;  T[:, j:] -= g (x) N_b[j, j:]
//   E[:, b] = W0[:, b] - Q[:, b]
//
// Rounding, u = 2^-24: an entry weight is off by at most c u (|W0| + |E| |R| |U_b|), c = i1 + 130
// on the CPU and i1 / 16 + 180 on CUDA (P_b and N_b as on the CPU, but E P_b on tensor cores with
// the bound of core/gemm.cuh); inside the block each column adds at most 128 u |g| |N_b|. The two
// sides' decisions differ where one hangs by that. Every sum has a fixed order on each side.
//
// Sum over columns of loss = 1/2 E H' E^T per row. Equal to the textbook (Cholesky, inverse,
// Cholesky, right-looking) in exact arithmetic, with an eighth of its factorisation work.
// Sources: Frantar & Alistarh 2023 (SparseGPT) alg. 1; Frantar et al. 2022 (GPTQ) alg. 1; the
// feedback form: Chee et al. 2023 (QuIP) section 3 (LDLQ).
#pragma once

#include <cstdint>
#include <numeric>
#include <optional>
#include <string>

#include "core/among.h"
#include "core/tensor.h"

namespace distaya {

// Where the mask comes from.
//   unstructured: per block, the k smallest scores over all rows on entry to the block.
//   nm: at the first column of each group of m, the m - n smallest scores of each row (a shorter
//       last group of r columns loses max(0, r - n)).
//   Ties: the lower index (row-major) is pruned first.
//   Where the rows lie on several ranks (Obs::among), the k smallest over all of them go, exactly
//   as if one process had the matrix: three exchanges of 2048, 1024 and 1024 counts per block, so
//   that a rank gives 8 (2048 + 1024 + 1024) = 32768 bytes and gets as many from each of the
//   others. The last table also holds how many ties each rank has. Blocks of which none go exchange
//   nothing, and neither do the other modes.
enum class Select : int { none, unstructured, nm, given };

// How a group of weights gets its grid, q = scale * (code - zero), code in 0..2^bits-1.
//   low = min(w, 0), high = max(w, 0); symmetric: high = max(-low, high), low = low < 0 ? -high :
//   0; low == high == 0: (-1, 1); scale = (high - low) / (2^bits - 1) rounded to scale_dtype (at
//   least 2^-126, in f16 2^-24 and at most 65504), zero = 2^(bits-1) if symmetric else
//   clamp(round(-low / scale)). mse: of the shrink factors 1 - i/100 (i = 0..79) of low and high,
//   the first with the least sum |q - w|^2.4.  code = clamp(round(w / scale) + zero), rounding half
//   to even.
struct Grid {
  int bits = 0;  // 2..8; 0: do not quantise
  bool symmetric = false;
  bool mse = false;
  Dtype scale_dtype = Dtype::f32;  // f32, bf16 or f16
};

struct Obs {
  int64_t rows, cols;
  void* W;         // [rows, cols] of dtype: original in, result out
  Dtype dtype;     // f32, bf16 or f16; all arithmetic is fp32
  const float* R;  // [cols, cols]; only the upper triangle is read

  Select select = Select::none;
  double sparsity = 0;     // unstructured: share to prune, 0 <= sparsity < 1
  bool reference = false;  // as published: counts and ties (see prune_count), and dynamic grids
                           // from T on entry to the block instead of T at the group's first column
  int64_t n = 0, m = 0;    // nm: n kept of every m
  bool* mask = nullptr;    // [rows, cols] true = kept: in for given, out for unstructured and nm,
                           // null for none

  Grid grid;
  int64_t group = 0;     // columns per grid, at least 1 (whole row: group == cols)
  int64_t groups = 0;    // columns of scales and zeros
  bool dynamic = false;  // grid of group g from T at column g * group (block_columns % group
                         // == 0); otherwise scales and zeros are inputs
  const int64_t* group_of = nullptr;  // [cols] group of column j, null: j / group (not dynamic)
  uint8_t* codes = nullptr;           // [rows, cols] out; a pruned weight's code is its zero
  float* scales = nullptr;            // [rows, groups] out if dynamic, else in
  float* zeros = nullptr;             // [rows, groups] likewise

  const Among* among =
      nullptr;  // null: all rows are here. Else `rows` are this rank's, and may be 0

  double* loss;  // [rows] out; zeros in. fp32 sums inside a block, in double over blocks
  void* work;    // obs_work_cuda() bytes, 256-aligned; null on the CPU
  int device;    // CUDA ordinal
};

// Round to nearest on the grids of W itself (RTN); also makes the inputs of a non-dynamic sweep.
struct Quantize {
  int64_t rows, cols;
  void* W;      // [rows, cols] of dtype; rounded in place if codes is not null, else left alone
  Dtype dtype;  // f32, bf16 or f16
  Grid grid;
  int64_t group, groups;  // group g covers columns [g * group, min((g + 1) * group, cols))
  uint8_t* codes;         // [rows, cols] out, or null: grids only
  float* scales;          // [rows, groups] out
  float* zeros;           // [rows, groups] out
  int device;
};

inline constexpr int64_t kObsBlock = 128;  // SparseGPT's and GPTQ's: masks are chosen per block

// The k smallest scores by radix: a score is not negative, so it orders like its 31 bits.
inline constexpr int kBins = 2048, kPasses = 3;  // bits 30..20, 19..10, 9..0

inline constexpr int bins_of(int pass) { return pass == 0 ? kBins : kBins / 2; }

inline constexpr int shift_of(int pass) { return 20 - 10 * pass; }

// Columns per block: 128, or the most below it that whole N:M groups (and grids) divide. 0: none.
inline int64_t block_columns(const Obs& p) {
  int64_t step = p.select == Select::nm ? p.m : 1;
  if (p.grid.bits && p.dynamic) step = std::lcm(step, p.group);
  return kObsBlock / step * step;
}

inline int64_t all_rows(const Obs& p) { return p.among ? p.among->total : p.rows; }

// unstructured: how many of the block [i1, i2) go. Counts are cumulative, so that the whole matrix
// loses exactly floor(rows * cols * sparsity). reference: every score <= the one at sorted position
// floor(rows * (i2 - i1) * sparsity) goes, as published (this many, plus ties).
inline int64_t prune_count(const Obs& p, int64_t i1, int64_t i2) {
  const auto share = [&](int64_t cols) {
    return static_cast<int64_t>(static_cast<double>(all_rows(p) * cols) * p.sparsity);
  };
  return p.reference ? share(i2 - i1) + 1 : share(i2) - share(i1);
}

void obs_cpu(const Obs& p);
void obs_cuda(const Obs& p, Stream stream);
int64_t obs_work_cuda(int64_t rows, int64_t cols);  // bytes of device scratch, enough for any mode

void quantize_cpu(const Quantize& p);
void quantize_cuda(const Quantize& p, Stream stream);

// The door (obs.cpp): checks, then one of the above.

struct GridOptions {  // as Python says it
  int64_t bits = 0, group = 0;
  bool symmetric = false, mse = false;
  std::string scale_dtype = "float32";
};

struct ObsOptions {
  std::string select = "none";
  double sparsity = 0;
  bool reference = false;
  int64_t n = 0, m = 0;
  GridOptions grid;
  bool dynamic = false;
};

using MaybeView = std::optional<Tensor>;

// scales and zeros are written if options.dynamic, read otherwise. tables: int64 [1 + world,
// kBins], goes with among.
void obs(const Tensor& W, const Tensor& R, const MaybeView& mask, const MaybeView& codes,
         const MaybeView& scales, const MaybeView& zeros, const MaybeView& group_of,
         const Tensor& loss, const Tensor& work, const ObsOptions& options,
         const AmongOptions* among, const MaybeView& tables);

// Bytes of `work` that a sweep of W [rows, cols] needs: 0 on the CPU.
int64_t obs_work(const Tensor& W);

void quantize(const Tensor& W, const MaybeView& codes, const Tensor& scales, const Tensor& zeros,
              const GridOptions& options);

}  // namespace distaya
