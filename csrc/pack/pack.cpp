#include "pack/pack.h"

#include <bit>

namespace distaya {
namespace pack {
namespace {

constexpr const char* kKinds[] = {"int4", "int3", "int8", "int4-2:4", "int4-mask", "int4-out"};
constexpr Dtype kScales[] = {Dtype::f32, Dtype::bf16, Dtype::f16};

// Tile and byte counts must not wrap: no matrix of this machine has 2^56 padded weights.
constexpr int64_t kMost = int64_t{1} << 56;

void check_sizes(int64_t rows, int64_t cols) {
  check(rows >= 0 && cols >= 0, "a packed matrix of ", rows, " x ", cols, " cannot be");
  const int64_t most_rows = kMost / kTileRows, most_cols = kMost / kTileCols;
  check(rows < most_rows && cols < most_cols, "a packed matrix of ", rows, " x ", cols,
        " is too large");
  const int64_t tall = (rows + kTileRows - 1) / kTileRows,
                wide = (cols + kTileCols - 1) / kTileCols;
  check(tall == 0 || wide <= kMost / kTileWeights / tall, "a packed matrix of ", rows, " x ", cols,
        " is too large");
}

// A mask that asks for more codes than its record holds leads a reader on into what follows, and
// from the records near the end (at most 4: none is shorter than kMaskBytes) out of the buffer.
void check_last_masks(const Format& f, const uint8_t* data, int64_t bytes) {
  const auto* offsets = reinterpret_cast<const int64_t*>(data);
  for (int64_t t = f.tiles() - 1; t >= 0; --t) {
    const int64_t at = offsets[t];
    if (at + f.values_at() + kTileWeights / 2 + kTail <= bytes) break;
    const auto* masks = reinterpret_cast<const uint64_t*>(data + at + f.body_at());
    int64_t values = 0;
    for (int chunk = 0; chunk < kChunks; ++chunk) values += (std::popcount(masks[chunk]) + 1) / 2;
    if (f.mask_record_bytes(values) != offsets[t + 1] - at) fail_record(t);
  }
}

void check_offsets(const Format& f, const Tensor& data, const char* name) {
  const auto* offsets = static_cast<const uint64_t*>(data.data);
  uint64_t at = static_cast<uint64_t>(f.offsets_bytes());
  const uint64_t least = static_cast<uint64_t>(f.mask_record_bytes(0));
  const uint64_t size = static_cast<uint64_t>(data.numel());
  check(offsets[0] == at, name, " says that its first record begins at byte ", offsets[0],
        " instead of ", at);
  for (int64_t t = 0; t < f.tiles(); ++t) {
    const uint64_t next = offsets[t + 1];
    check(next % 16 == 0 && next <= size && next >= at + least, name, " says that tile ", t,
          " lies from byte ", at, " to ", next, " of ", size);
    at = next;
  }
  check(static_cast<uint64_t>(f.bytes(static_cast<int64_t>(at))) == size, name, " has ", size,
        " bytes but its offsets and format say ", f.bytes(static_cast<int64_t>(at)));
  check_last_masks(f, static_cast<const uint8_t*>(data.data), data.numel());
}

}  // namespace

void fail_record(int64_t tile) {
  fail("the record of tile ", tile, " is not as long as its mask asks for: not a packed matrix");
}

Format read_spec(const std::vector<int64_t>& spec) {
  check(spec.size() == 8, "the spec of a packed matrix has 8 numbers but this one has ",
        spec.size());
  const int64_t kind = spec[0], group = spec[3], symmetric = spec[4], scale = spec[5];
  const int64_t n = spec[6], m = spec[7];
  check(0 <= kind && kind < 6, "kind ", kind, " of a packed matrix must be 0 to 5");
  check_sizes(spec[1], spec[2]);
  check(group == 0 || group == 32 || group == 64 || group == 128, "group is ", group,
        " but must be 32, 64, 128 or 0 (the whole row)");
  check(symmetric == 0 || symmetric == 1, "symmetric is ", symmetric, " but must be 0 or 1");
  check(0 <= scale && scale < 3, "scale dtype ", scale,
        " must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  Format f;
  f.kind = static_cast<Kind>(kind);
  f.rows = spec[1];
  f.cols = spec[2];
  f.group = group;
  f.symmetric = symmetric == 1;
  f.scale = kScales[scale];
  if (f.kind == Kind::int4_out) {
    check(m == 2 || m == 4 || m == 8 || m == 16, "int4-out keeps ", n, " of every ", m,
          " rows but the latter must be 2, 4, 8 or 16");
    check(0 < n && n < m, "int4-out keeps ", n, " of every ", m, " rows but must keep 1 to ",
          m - 1);
    f.n = static_cast<int>(n);
    f.m = static_cast<int>(m);
  } else {
    check(n == 0 && m == 0, "n:m is ", n, ":", m, " but only int4-out takes one, not ",
          kKinds[kind]);
  }
  return f;
}

const uint8_t* buffer_of(const Format& f, const Tensor& data, const char* name) {
  const auto [bytes] = data.shape<1>(name);
  data.need_contiguous(name);
  const auto* p = data.as<uint8_t>(name);
  check(reinterpret_cast<uintptr_t>(p) % 64 == 0, name, " (", data, ") is not aligned to 64 bytes");
  const bool fixed = f.kind != Kind::int4_mask;
  const int64_t least = fixed ? f.bytes(f.records_end())
                              : f.bytes(f.offsets_bytes() + f.tiles() * f.mask_record_bytes(0));
  check(fixed ? bytes == least : bytes >= least, name, " has ", bytes, " bytes but ",
        kKinds[static_cast<int>(f.kind)], " [", f.rows, ", ", f.cols, "] of group ", f.group,
        fixed ? " takes " : " takes at least ", least);
  if (!fixed && !data.on_cuda) check_offsets(f, data, name);
  return p;
}

}  // namespace pack

namespace {

using pack::Format;
using pack::Kind;

template <class T>
T* matrix(const Tensor& t, const char* name, int64_t rows, int64_t cols, const Tensor& like) {
  const auto [r, c] = t.shape<2>(name);
  check(r == rows && c == cols, name, " (", t, ") must be [", rows, ", ", cols, "]");
  t.need_contiguous(name);
  same_device(t, name, like, "its matrix");
  if constexpr (std::is_void_v<T>)
    return t.data;
  else
    return t.as<T>(name);
}

void* scales_of(const Tensor& scales, const Format& f, const Tensor& like) {
  check(scales.dtype == f.scale, "scales must be ", name_of(f.scale), " but are ", scales);
  return matrix<void>(scales, "scales", f.rows, f.groups(), like);
}

uint8_t* zeros_of(const Tensor* zeros, const Format& f, const Tensor& like) {
  check((zeros == nullptr) == f.symmetric, "zeros belong to an asymmetric matrix: ",
        zeros ? "these came with a symmetric one" : "this one came without");
  return zeros ? matrix<uint8_t>(*zeros, "zeros", f.rows, f.groups(), like) : nullptr;
}

template <class T>
T* vector(const Tensor& t, const char* name, int64_t size, const Tensor& like) {
  check(t.shape<1>(name)[0] == size, name, " (", t, ") must have ", size, " elements");
  t.need_contiguous(name);
  same_device(t, name, like, "codes");
  return t.as<T>(name);
}

void check_float(const Tensor& W) {
  dispatch<float, bf16, f16>(W.dtype, "W", []<class T>() {});
}

}  // namespace

void pack_survey(const Tensor& codes, const Tensor* zeros, const Spec& spec, const Tensor& out) {
  const Format f = pack::read_spec(spec);
  const auto [tiles, columns] = out.shape<2>("out");
  check(tiles == f.tiles() && columns == pack::kSurvey, "out (", out, ") must be [", f.tiles(),
        ", ", int{pack::kSurvey}, "]");
  const pack::Survey p{.f = f,
                       .codes = matrix<uint8_t>(codes, "codes", f.rows, f.cols, codes),
                       .zeros = zeros_of(zeros, f, codes),
                       .out = matrix<int64_t>(out, "out", tiles, columns, codes)};
  if (tiles == 0) return;
  if constexpr (has_cuda)
    if (codes.on_cuda) return pack::survey_cuda(p, codes.device, stream_of(codes));
  pack::survey_cpu(p);
}

void pack_write(const Tensor& codes, const Tensor& scales, const Tensor* zeros,
                const Tensor* offsets, const Spec& spec, const Tensor& data, const Tensor& bad) {
  const Format f = pack::read_spec(spec);
  const bool mask = f.kind == Kind::int4_mask;
  check((offsets != nullptr) == mask, "offsets are what int4-mask takes, and no other kind");
  const auto [bytes] = data.shape<1>("data");
  const pack::Pack p{
      .f = f,
      .codes = matrix<uint8_t>(codes, "codes", f.rows, f.cols, codes),
      .scales = scales_of(scales, f, codes),
      .zeros = zeros_of(zeros, f, codes),
      .offsets = mask ? vector<int64_t>(*offsets, "offsets", f.tiles() + 1, codes) : nullptr,
      .data = vector<uint8_t>(data, "data", bytes, codes),
      .bytes = bytes,
      .bad = vector<int64_t>(bad, "bad", pack::kBads, codes)};
  check(reinterpret_cast<uintptr_t>(p.data) % 64 == 0, "data (", data,
        ") is not aligned to 64 bytes");
  const int64_t least = mask ? f.bytes(f.offsets_bytes() + f.tiles() * f.mask_record_bytes(0))
                             : f.bytes(f.records_end());
  check(mask ? bytes >= least : bytes == least, "data has ", bytes, " bytes but the matrix takes ",
        mask ? "at least " : "", least);
  if constexpr (has_cuda)
    if (codes.on_cuda) return pack::pack_cuda(p, codes.device, stream_of(codes));
  pack::pack_cpu(p);
}

void pack_read(const Tensor& data, const Spec& spec, const Tensor& codes, const Tensor& scales,
               const Tensor* zeros) {
  const Format f = pack::read_spec(spec);
  const pack::Unpack p{.f = f,
                       .data = pack::buffer_of(f, data, "data"),
                       .codes = matrix<uint8_t>(codes, "codes", f.rows, f.cols, data),
                       .scales = scales_of(scales, f, data),
                       .zeros = zeros_of(zeros, f, data)};
  if (f.rows == 0) return;
  if constexpr (has_cuda)
    if (data.on_cuda) return pack::unpack_cuda(p, data.device, stream_of(data));
  pack::unpack_cpu(p);
}

void pack_dequantize(const Tensor& data, const Spec& spec, int64_t first, const Tensor& W) {
  const Format f = pack::read_spec(spec);
  check_float(W);
  const auto [count, cols] = W.shape<2>("W");
  check(first >= 0 && first % pack::kTileRows == 0 && count <= f.rows && first <= f.rows - count,
        "rows ", first, " to ", first + count, " of ", f.rows,
        " cannot be read: the first must be ", "a multiple of ", pack::kTileRows);
  const pack::Dequantize p{.f = f,
                           .data = pack::buffer_of(f, data, "data"),
                           .first = first,
                           .count = count,
                           .dtype = W.dtype,
                           .W = matrix<void>(W, "W", count, f.cols, data)};
  if (count == 0 || cols == 0) return;
  if constexpr (has_cuda)
    if (data.on_cuda) return pack::dequantize_cuda(p, data.device, stream_of(data));
  pack::dequantize_cpu(p);
}

void pack_gather(const Tensor& data, const Spec& spec, const Tensor& indices, const Tensor& W) {
  const Format f = pack::read_spec(spec);
  check_float(W);
  const auto [count] = indices.shape<1>("indices");
  const pack::Gather p{.f = f,
                       .data = pack::buffer_of(f, data, "data"),
                       .indices = vector<int64_t>(indices, "indices", count, data),
                       .count = count,
                       .dtype = W.dtype,
                       .W = matrix<void>(W, "W", count, f.cols, data)};
  if (!indices.on_cuda)
    for (int64_t i = 0; i < count; ++i)
      check(0 <= p.indices[i] && p.indices[i] < f.rows, "index ", p.indices[i], " at place ", i,
            " is no row of a matrix of ", f.rows, " rows");
  if (count == 0 || f.cols == 0) return;
  if constexpr (has_cuda)
    if (data.on_cuda) return pack::gather_cuda(p, data.device, stream_of(data));
  pack::gather_cpu(p);
}

}  // namespace distaya
