#include "cuda_sim/products.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cuda_sim/engine.h"
#include "cuda_sim/tensor_cores.h"

namespace cuda_sim {
namespace {

// The four warps of a group must issue the same products: what each of them said so far.
struct Issued {
  uint64_t b;
  int n;
  bool add, sparse;
  bool operator==(const Issued&) const = default;
};

std::vector<Issued> issued_by_group[kMostThreads / 128];

// Bytes of row r (of n) of operand B: 128-byte swizzle, from the descriptor's fields. Chunks of 16
// bytes are exchanged by the address bits 7..9.
uint8_t* b_chunk(uint64_t descriptor, int r, int chunk) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3fffu) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fffu) << 4;
  const uint32_t linear = start + r / 8 * stride + r % 8 * 128 + 16 * chunk;
  const uint32_t at = linear ^ (linear >> 7 & 7u) << 4;
  return static_cast<uint8_t*>(shadow.from_shared_address(at));
}

int chunks_of(const Shape& shape) { return shape.sparse ? 4 : 2; }  // of 16 bytes of a row

template <class F>
void over_b(const Product& p, const F& body) {
  for (int r = 0; r < p.n; ++r)
    for (int chunk = 0; chunk < chunks_of(p.shape); ++chunk) body(b_chunk(p.b, r, chunk));
}

void need_descriptor(uint64_t b, int n, const Where& where) {
  const auto layout = static_cast<int>(b >> 62);
  const auto stride = static_cast<int>(b >> 32 & 0x3fffu) << 4;
  if (layout != 1 || stride != 1024 || (b >> 49 & 7u))
    violate("a product's operand B has layout " + std::to_string(layout) + ", row stride " +
                std::to_string(stride) + " and base offset " + std::to_string(b >> 49 & 7u) +
                "; simulated is the 128-byte swizzle (1) with 1024 and 0",
            where);
  if (n % 8 || n < 8 || n > 256)
    violate("a product has " + std::to_string(n) + " columns; 8, 16 .. 256 exist", where);
}

// Written, by a thread that fenced afterwards, and then a barrier for all.
void need_fenced(const Cell& cell, const uint8_t* at, const Where& where) {
  const auto name = [&] { return shadow.describe(reinterpret_cast<uintptr_t>(at)); };
  if (cell.write.epoch < shadow.now.block)
    violate("not written: a product reads " + name() + ", which no thread of the block has written",
            where);
  if (cell.copying)
    violate("copy under way: a product reads " + name() +
                ", where an asynchronous copy has not been waited for",
            where);
  const auto& fences = engine.thread[cell.write.thread].products.fences;
  const auto fence =
      std::ranges::lower_bound(fences, cell.event, {}, &std::pair<uint32_t, uint32_t>::first);
  const std::string writer = "thread " + std::to_string(cell.write.thread);
  if (fence == fences.end())
    violate("not fenced: a product reads " + name() + ", which " + writer +
                " has written without fence_for_products",
            where);
  if (fence->second >= shadow.now.epoch)
    violate("race: a product reads " + name() + ", which " + writer +
                " has written with no barrier since its fence_for_products",
            where);
}

void need_the_same_in_group(const Products& mine, const Issued& what, const Where& where) {
  const int group = engine.current / 128;
  if ((group + 1) * 128 > engine.threads)
    violate("a product needs four whole warps but the block has " + std::to_string(engine.threads) +
                " threads",
            where);
  auto& all = issued_by_group[group];
  if (all.size() == mine.issued) all.push_back(what);
  if (!(all[mine.issued] == what))
    violate("divergence: the warps of a group issue different products", where);
}

// This lane's rows g and g + 8 of A, zeros filled in.
std::vector<float> rows_of_a(const Meeting& m, const Shape& shape, const Where& where) {
  const int k = shape.sparse ? 32 : 16;
  std::vector<float> out(2 * k, 0.f);
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 16; ++i) {
      const Operand a{m, shape};
      const int row = lane() / 4 + 8 * half;
      const int column = shape.sparse ? a.column(row, i) : i;
      if (column < 0) violate(bad_metadata(a, row, i), where);
      out[half * k + column] = a.a(row, i);
    }
  return out;
}

float dot(const float* a, const uint64_t b, int column, const Shape& shape) {
  double sum = 0;
  for (int chunk = 0; chunk < chunks_of(shape); ++chunk) {
    uint16_t values[8];
    std::memcpy(values, b_chunk(b, column, chunk), sizeof values);
    for (int i = 0; i < 8; ++i) {
      const float x = shape.bf16 ? bf16_to_float(values[i]) : half_to_float(values[i]);
      sum += static_cast<double>(a[8 * chunk + i]) * x;
    }
  }
  return static_cast<float>(sum);
}

std::vector<float> value_of(const Product& p) {
  const int c = lane() % 4, k = p.shape.sparse ? 32 : 16;
  std::vector<float> out(p.n / 2);
  for (int i = 0; i < p.n / 8; ++i)
    for (int e = 0; e < 4; ++e) {
      const float part = dot(&p.a[e / 2 * k], p.b, 8 * i + 2 * c + e % 2, p.shape);
      const int at = 4 * i + e;
      out[at] = (p.adds ? p.addend[at] : 0.f) + part;
    }
  return out;
}

void release_b(const Product& p) {
  if (!p.holds_b) return;
  over_b(p, [](uint8_t* at) {
    Cell* cell = shadow.cells(at, 16, "reads", {});
    for (int b = 0; b < 16; ++b) {
      --cell[b].products;
      shadow.note_read(cell[b]);
    }
  });
}

void need_same_a(const Product& p) {
  for (int i = 0; i < 4; ++i)
    if (p.a_at[i] != p.a_words[i])
      violate("in use: register " + std::to_string(i) +
                  " of a product's operand A was written before the product was waited for",
              p.where);
}

}  // namespace

// To D, or to the next product under way that has the same D.
void Products::deliver(size_t count) {
  for (size_t i = 0; i < count; ++i) need_same_a(list[i]);  // before any gives up its B
  for (size_t i = 0; i < count; ++i) {
    std::vector<float> value = value_of(list[i]);
    release_b(list[i]);
    const auto next = std::find_if(list.begin() + static_cast<long>(i) + 1, list.end(),
                                   [&](const Product& p) { return p.d == list[i].d; });
    if (next == list.end())
      std::ranges::copy(value, list[i].d);
    else if (next->adds)
      next->addend = std::move(value);
  }
  list.erase(list.begin(), list.begin() + static_cast<long>(count));
}

void Products::abandon() {
  for (const Product& p : list)
    if (p.holds_b)
      over_b(p, [](uint8_t* at) {
        Cell* cell = shadow.cells(at, 16, "reads", {});
        for (int b = 0; b < 16; ++b) --cell[b].products;
      });
  *this = {};
  for (auto& group : issued_by_group) group.clear();
}

void fence_for_products() {
  engine.me().products.fences.emplace_back(++shadow.now.event, shadow.now.epoch);
}

void product_fence() {
  warp_barrier_only("product_fence");
  engine.me().products.fenced = true;
}

void product_issue(const Shape& shape, int n, float* d, const uint32_t* a, uint64_t b,
                   uint32_t meta, bool add, Place place) {
  const Where where{place};
  Products& mine = engine.me().products;
  need_descriptor(b, n, where);
  if (!mine.fenced)
    violate("not fenced: a product begins without product_fence since the last group", where);
  need_the_same_in_group(mine, {b, n, add, shape.sparse}, where);
  ++mine.issued;
  uint32_t words[5] = {a[0], a[1], a[2], a[3], meta};
  Meeting& m = meet(shape.sparse ? "wgmma_sparse" : "wgmma", 0xffffffffu, words, 5, nullptr, place);
  Product p{shape, n, d, add, {}, b, lane() == 0, rows_of_a(m, shape, where), a, {}, where};
  std::copy_n(a, 4, p.a_words.begin());
  part(m);
  if (add) p.addend.assign(d, d + n / 2);  // NaN where a product with this D is under way
  std::fill(d, d + n / 2, std::numeric_limits<float>::quiet_NaN());
  if (p.holds_b)
    over_b(p, [&](uint8_t* at) {
      Cell* cell = shadow.cells(at, 16, "a product reads", where);
      for (int i = 0; i < 16; ++i) {
        need_fenced(cell[i], at + i, where);
        ++cell[i].products;
      }
    });
  mine.list.push_back(std::move(p));
}

void product_commit() {
  warp_barrier_only("product_commit");
  Products& mine = engine.me().products;
  mine.closed.push_back(mine.list.size());
  mine.fenced = false;
}

void product_wait(int pending) {
  warp_barrier_only("product_wait");
  Products& mine = engine.me().products;
  const int done = static_cast<int>(mine.closed.size()) - pending;
  if (done <= 0) return;
  const size_t count = mine.closed[done - 1];
  mine.deliver(count);
  mine.closed.erase(mine.closed.begin(), mine.closed.begin() + done);
  for (size_t& end : mine.closed) end -= count;
}

}  // namespace cuda_sim
