#include "cuda_sim/tensor_cores.h"

#include <bit>
#include <cstring>

namespace cuda_sim {
namespace {

constexpr int kMeta = 4, kB = 5, kD = 9;

uint32_t packed(const Shape& s) { return s.bf16 | s.tf32 << 1 | s.sparse << 2 | s.selector << 3; }

Shape unpacked(uint32_t x) {
  return {(x & 1) != 0, (x & 2) != 0, (x & 4) != 0, static_cast<int>(x >> 3)};
}

// D + A B: products are exact, their sum is taken in double and rounded once with D.
void multiply_all(Meeting& m) {
  const Operand operand{m, unpacked(m.in[0][13])};
  const int stored = operand.shape.tf32 ? 8 : 16;
  const int deep = operand.shape.sparse ? 32 : stored;
  double b[32][8];
  for (int k = 0; k < deep; ++k)
    for (int n = 0; n < 8; ++n) b[k][n] = operand.b(k, n);
  for (int row = 0; row < 16; ++row) {
    double sum[8] = {};
    for (int i = 0; i < stored; ++i) {
      const int k = operand.shape.sparse ? operand.column(row, i) : i;
      if (k < 0) violate(bad_metadata(operand, row, i), {});
      const double a = operand.a(row, i);
      for (int n = 0; n < 8; ++n) sum[n] += a * b[k][n];
    }
    for (int n = 0; n < 8; ++n) {
      const int lane = row % 8 * 4 + n / 2, e = row / 8 * 2 + n % 2;
      const double d = std::bit_cast<float>(m.in[lane][kD + e]);
      m.out[lane][e] = std::bit_cast<uint32_t>(static_cast<float>(d + sum[n]));
    }
  }
}

void read_matrices(Meeting&) {}

}  // namespace

float Operand::value(uint32_t word, int half) const {
  const auto bits = static_cast<uint16_t>(word >> 16 * half);
  return shape.bf16 ? bf16_to_float(bits) : half_to_float(bits);
}

float Operand::a(int row, int i) const {
  const int high = row / 8, first = 4 * (row % 8);
  if (shape.tf32)  // the hardware does not look at the last 13 bits
    return std::bit_cast<float>(m.in[first + i % 4][high + 2 * (i / 4)] & ~0x1fffu);
  return value(m.in[first + i % 8 / 2][high + 2 * (i / 8)], i % 2);
}

uint32_t Operand::pair(int row, int i) const {
  const int group = i / 2, lane = 4 * (row % 8) + 2 * shape.selector + group / 4;
  return m.in[lane][kMeta] >> (16 * (row / 8) + 4 * (group % 4)) & 15u;
}

int Operand::column(int row, int i) const {
  const uint32_t low = pair(row, i) & 3u, high = pair(row, i) >> 2;
  if (low >= high) return -1;
  return i / 2 * 4 + static_cast<int>(i % 2 ? high : low);
}

float Operand::b(int row, int column) const {
  const int first = 4 * column;
  if (shape.tf32) return std::bit_cast<float>(m.in[first + row % 4][kB + row / 4] & ~0x1fffu);
  return value(m.in[first + row % 8 / 2][kB + row / 8], row % 2);
}

std::string bad_metadata(const Operand& a, int row, int i) {
  const uint32_t pair = a.pair(row, i);
  return "illegal metadata: group " + std::to_string(i / 2) + " of row " + std::to_string(row) +
         " of a 2:4 operand keeps columns " + std::to_string(pair & 3u) + " and " +
         std::to_string(pair >> 2) + ", which do not rise";
}

void multiply(const Shape& shape, float* d, const uint32_t* a, const uint32_t* b, int b_words,
              uint32_t meta, Place place) {
  uint32_t words[14] = {a[0], a[1], a[2], a[3], meta};
  for (int i = 0; i < b_words; ++i) words[kB + i] = b[i];
  for (int i = 0; i < 4; ++i) words[kD + i] = std::bit_cast<uint32_t>(d[i]);
  words[13] = packed(shape);
  const char* what = shape.tf32 ? "mma_tf32" : shape.sparse ? "mma_sparse" : "mma";
  Meeting& m = meet(what, 0xffffffffu, words, 14, multiply_all, place);
  for (int i = 0; i < 4; ++i) d[i] = std::bit_cast<float>(m.out[lane()][i]);
  part(m);
}

void load_matrices(uint32_t* out, const void* row, bool transposed, Place place) {
  const Where where{place};
  const auto at = reinterpret_cast<uintptr_t>(row);
  if (!shadow.is_shared(row))
    violate("load_matrices reads " + shadow.describe(at) + ", not shared memory", where);
  if (at % 16) violate("misaligned: load_matrices reads 16 bytes at " + shadow.describe(at), where);
  shadow.touch(Access::read, row, 16, where);
  uint32_t words[4];
  std::memcpy(words, row, sizeof words);
  Meeting& m = meet(transposed ? "load_transposed" : "load_matrices", 0xffffffffu, words, 4,
                    read_matrices, place);
  const int g = lane() / 4, c = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const auto element = [&](int r, int k) {
      return m.in[8 * i + r][k / 2] >> 16 * (k % 2) & 0xffffu;
    };
    out[i] = transposed ? element(2 * c, g) | element(2 * c + 1, g) << 16
                        : element(g, 2 * c) | element(g, 2 * c + 1) << 16;
  }
  part(m);
}

float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

uint16_t float_to_bf16(float x) {
  const auto u = std::bit_cast<uint32_t>(x);
  if (x != x) return 0x7fff;  // as the device does it
  return static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16, e = bits >> 10 & 31u, m = bits & 0x3ffu;
  if (e == 0)
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(static_cast<float>(m) * 0x1p-24f));
  return std::bit_cast<float>(sign | (e == 31 ? 255u : e + 112u) << 23 | m << 13);
}

uint16_t float_to_half(float x) {
  const auto u = std::bit_cast<uint32_t>(x);
  const uint32_t sign = u >> 16 & 0x8000u, size = u & 0x7fffffffu;
  if (x != x) return 0x7fff;
  if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (size < 0x38800000u) {  // subnormal: adding 1/2 rounds at 2^-24
    const float rounded = std::bit_cast<float>(size) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(rounded) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13);
}

}  // namespace cuda_sim
