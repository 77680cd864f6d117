// wgmma: what a thread's warp has issued and not waited for.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda_sim/api.h"
#include "cuda_sim/shadow.h"

namespace cuda_sim {

// A thread's part of a product: its own elements of D. The warp's rows of A were taken at issue;
// that the registers they came from are left alone until the wait is checked there.
struct Product {
  Shape shape;
  int n;
  float* d;
  bool adds;
  std::vector<float> addend;  // D before, once it is known: of this thread, where it adds
  uint64_t b;
  bool holds_b;          // this lane keeps the bytes of B reserved, for its warp
  std::vector<float> a;  // [2][k]: this lane's rows of A, dense
  const uint32_t* a_at;  // this thread's registers of A, which must stay as they are
  std::array<uint32_t, 4> a_words;
  Where where;
};

struct Products {
  std::vector<Product> list;
  std::vector<size_t> closed;
  std::vector<std::pair<uint32_t, uint32_t>> fences;  // event, epoch of each fence_for_products
  size_t issued = 0;
  bool fenced = false;  // product_fence since the last commit

  void deliver(size_t count);
  void abandon();
};

}  // namespace cuda_sim
