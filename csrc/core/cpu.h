// CPU services shared by all rooms: which instruction set runs, how work is spread, when a long
// kernel may be stopped, aligned scratch.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <string_view>

#ifdef DISTAYA_SANITIZE_THREAD
#include <thread>
#include <vector>
#endif

namespace distaya::cpu {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

// Best set this CPU offers, lowered by DISTAYA_ISA=avx2|portable or set_isa() (tests use both).
Isa isa();
Isa best_isa();
void set_isa(Isa wanted);  // throws Error when the CPU lacks it
const char* name_of(Isa isa);
Isa parse_isa(std::string_view name);  // throws Error for an unknown name

// Threads a parallel_for may use: torch's OpenMP pool, or 1 in a forked child. A pool does not
// survive fork(): its threads are gone, and the next parallel region would wait for them forever.
int threads();

// How many forks lie between this process and the one that loaded the module.
int forks();

// What asks whether to stop is known to the module alone: it throws to end the kernel that asks.
using Poll = void (*)();
void set_poll(Poll poll);

// Called by long kernels between two blocks of work, outside of parallel bodies. Asks at most every
// 50 ms, else it costs a look at the clock. What a stopped kernel was to write is left half done.
void check_interrupt();

// The first exception of a parallel region. One that left a body would end the process.
class Failure {
 public:
  template <class Body>
  void guard(const Body& body, int64_t i) {
    try {
      body(i);
    } catch (...) {
      if (!taken_.test_and_set()) first_ = std::current_exception();
    }
  }

  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::atomic_flag taken_ = ATOMIC_FLAG_INIT;
  std::exception_ptr first_;
};

// Calls body(i) for i in [0, n) on torch's OpenMP pool. Which thread runs which i never changes a
// result: a body writes only what belongs to its own i.
template <class Body>
void parallel_for(int64_t n, const Body& body) {
  if (n <= 1 || threads() == 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  Failure failure;
#ifdef DISTAYA_SANITIZE_THREAD
  // ThreadSanitizer does not see libgomp's barriers and would call every region a race. Between
  // these threads only birth and join order anything: the counter itself is relaxed.
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) failure.guard(body, i);
  };
  std::vector<std::thread> team(static_cast<size_t>(std::min<int64_t>(threads(), n) - 1));
  for (std::thread& member : team) member = std::thread(work);
  work();
  for (std::thread& member : team) member.join();
#else
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < n; ++i) failure.guard(body, i);
#endif
  failure.rethrow();
}

// parallel_for that may be interrupted after every `at_once` bodies.
template <class Body>
void parallel_for_interruptible(int64_t n, int64_t at_once, const Body& body) {
  for (int64_t first = 0; first < n; first += at_once) {
    check_interrupt();
    parallel_for(std::min(at_once, n - first), [&](int64_t i) { body(first + i); });
  }
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
