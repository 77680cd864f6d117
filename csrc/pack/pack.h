// Packing a quantised matrix into the tiles of layout.h, and reading it back.
//
// A matrix arrives as codes uint8 [rows, cols], scales [rows, groups] and zeros uint8 [rows,
// groups] (none: symmetric); weight = scale * (code - zero). Padding is given the code of its zero,
// so that it is exactly 0: in a group that exists the group's own zero, elsewhere (rows and groups
// beyond the matrix) scale 0 and the symmetric zero. A buffer has no byte that is left to chance.
//
// int4_24 always stores two weights of each group of 4: where fewer are kept, the lowest pruned
// columns fill up, with the code of zero. int4_mask is packed in two steps, because its records
// differ in size: a survey of the tiles, a running sum by the caller, then the records.
#pragma once

#include <cstdint>
#include <vector>

#include "core/tensor.h"
#include "pack/layout.h"

namespace distaya::pack {

// spec = [kind, rows, cols, group, symmetric, scale dtype (0 f32, 1 bf16, 2 f16), n, m]: how a
// Format crosses from Python. Throws Error for a field that makes no sense.
Format read_spec(const std::vector<int64_t>& spec);

// The bytes of a packed buffer, after checking that they are what the format says: uint8, one
// dimension, contiguous, aligned to 64, of the right size and (int4_mask on the CPU) with offsets
// that ascend inside the buffer, and with masks that lead no reader out of it.
const uint8_t* buffer_of(const Format& f, const Tensor& data, const char* name);

// Refuses an int4_mask whose mask does not agree with the length of its record.
[[noreturn]] void fail_record(int64_t tile);

// The two columns int4_24 stores of a group of 4 in which `kept` (4 bits) are kept: lower index |
// higher index << 2. 0, which is no pair, where more than two are kept.
DISTAYA_HD constexpr uint32_t pair_of(uint32_t kept) {
  return static_cast<uint32_t>(0x000e0dcc09884444ull >> 4 * kept & 15);
}

// What can be wrong with content. Each is a counter, -1 on entry; the lowest index is left there.
enum Bad {
  kBadCode,     // flat index of a code that needs more bits
  kBadPattern,  // flat index of the first weight of a group that keeps too many
  kBadZero,     // flat index in zeros, likewise out of range
  kBadScale,    // flat index in scales, Inf or NaN
  kBadRecord,   // tile whose record is not as long as the offsets say
  kBads
};

// What a tile would take, whatever its kind. out [tiles][kSurvey]: bytes of kept codes as int4_mask
// and int4_out chunk them, and the most weights kept of any 4 columns, 4 rows and 8 rows.
enum Found { kValueBytes, kMostOf4Columns, kMostOf4Rows, kMostOf8Rows, kSurvey };

struct Survey {
  Format f;
  const uint8_t* codes;
  const uint8_t* zeros;  // null: symmetric
  int64_t* out;
};

struct Pack {
  Format f;
  const uint8_t* codes;
  const void* scales;      // [rows, groups] of f.scale
  const uint8_t* zeros;    // null: symmetric
  const int64_t* offsets;  // int4_mask: [tiles + 1], from the start of the buffer
  uint8_t* data;
  int64_t bytes;  // of data
  int64_t* bad;   // [kBads]
};

struct Unpack {
  Format f;
  const uint8_t* data;
  uint8_t* codes;
  void* scales;
  uint8_t* zeros;  // null: symmetric
};

// W [count, cols] = the rows [first, first + count) as floats: scale * (code - zero) in fp32, then
// rounded to dtype. first is a multiple of kTileRows.
struct Dequantize {
  Format f;
  const uint8_t* data;
  int64_t first, count;
  Dtype dtype;
  void* W;
};

// W [count, cols] = the rows named by indices. The CPU refuses an index that is no row; CUDA, which
// cannot without waiting, fills its row with NaN.
struct Gather {
  Format f;
  const uint8_t* data;
  const int64_t* indices;
  int64_t count;
  Dtype dtype;
  void* W;
};

void survey_cpu(const Survey& p);
void survey_cuda(const Survey& p, int device, Stream stream);
void pack_cpu(const Pack& p);
void pack_cuda(const Pack& p, int device, Stream stream);
void unpack_cpu(const Unpack& p);
void unpack_cuda(const Unpack& p, int device, Stream stream);
void dequantize_cpu(const Dequantize& p);
void dequantize_cuda(const Dequantize& p, int device, Stream stream);
void gather_cpu(const Gather& p);
void gather_cuda(const Gather& p, int device, Stream stream);

}  // namespace distaya::pack

namespace distaya {

using Spec = std::vector<int64_t>;

// The doors. zeros and offsets may be null.
void pack_survey(const Tensor& codes, const Tensor* zeros, const Spec& spec, const Tensor& out);
void pack_write(const Tensor& codes, const Tensor& scales, const Tensor* zeros,
                const Tensor* offsets, const Spec& spec, const Tensor& data, const Tensor& bad);
void pack_read(const Tensor& data, const Spec& spec, const Tensor& codes, const Tensor& scales,
               const Tensor* zeros);
void pack_dequantize(const Tensor& data, const Spec& spec, int64_t first, const Tensor& W);
void pack_gather(const Tensor& data, const Spec& spec, const Tensor& indices, const Tensor& W);

}  // namespace distaya
