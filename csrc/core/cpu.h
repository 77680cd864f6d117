// CPU services shared by all rooms: which instruction set runs, how work is spread, aligned
// scratch.
#pragma once

#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <string_view>

namespace distaya::cpu {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

// Best set this CPU offers, lowered by DISTAYA_ISA=avx2|portable or set_isa() (tests use both).
Isa isa();
Isa best_isa();
void set_isa(Isa wanted);  // throws Error when the CPU lacks it
const char* name_of(Isa isa);
Isa parse_isa(std::string_view name);  // throws Error for an unknown name

// Calls body(i) for i in [0, n) on torch's OpenMP pool. Which thread runs which i never changes a
// result: a body writes only what belongs to its own i.
template <class Body>
void parallel_for(int64_t n, const Body& body) {
  if (n <= 1 || omp_get_max_threads() == 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < n; ++i) body(i);
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// 64-byte aligned scratch of n elements, uninitialised.
template <class T>
using Scratch = std::unique_ptr<T[], Free>;

void* allocate(size_t bytes);  // throws std::bad_alloc; large blocks ask for huge pages

template <class T>
Scratch<T> scratch(int64_t n) {
  return Scratch<T>(static_cast<T*>(allocate(static_cast<size_t>(n) * sizeof(T))));
}

}  // namespace distaya::cpu
