// wgmma: what a thread's warp has issued and not waited for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda_sim/api.h"

namespace cuda_sim {

// A thread's part of a product: its own elements of D. The warp's rows of A were taken at issue.
struct Product {
  Shape shape;
  int n;
  float* d;
  std::vector<float> addend;  // this thread's D before, empty where D is overwritten
  bool chained;               // or what the product before leaves there
  uint64_t b;
  bool holds_b;          // this lane keeps the bytes of B reserved, for its warp
  std::vector<float> a;  // [2][k]: this lane's rows of A, dense
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
