#include "core/cpu.h"

#include <omp.h>
#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>

#include "core/check.h"

namespace distaya::cpu {
namespace {

Isa detect() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("avx512bf16") &&
                      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
}

std::atomic<int>& current() {
  static std::atomic<int> value = [] {
    const char* wanted = std::getenv("DISTAYA_ISA");
    if (!wanted || !*wanted) return static_cast<int>(best_isa());
    const Isa isa = parse_isa(wanted);
    check(isa <= best_isa(), "DISTAYA_ISA=", wanted, " but this CPU offers ", name_of(best_isa()));
    return static_cast<int>(isa);
  }();
  return value;
}

std::atomic<int> generation{0};
std::atomic<Poll> interrupt{nullptr};

// Runs in the child, before anything else does.
void count_fork() { generation.fetch_add(1, std::memory_order_relaxed); }

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, count_fork);

}  // namespace

int forks() { return generation.load(std::memory_order_relaxed); }

int threads() { return forks() > 0 ? 1 : omp_get_max_threads(); }

void set_poll(Poll poll) { interrupt.store(poll, std::memory_order_relaxed); }

void check_interrupt() {
  using Clock = std::chrono::steady_clock;
  const Poll ask = interrupt.load(std::memory_order_relaxed);
  if (!ask) return;
  thread_local Clock::time_point next{};
  const Clock::time_point now = Clock::now();
  if (now < next) return;
  next = now + std::chrono::milliseconds(50);
  ask();
}

const char* name_of(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable";
}

Isa parse_isa(std::string_view name) {
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512})
    if (name == name_of(isa)) return isa;
  fail("the instruction set '", name, "' must be portable, avx2 or avx512");
}

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa isa() { return static_cast<Isa>(current().load(std::memory_order_relaxed)); }

void set_isa(Isa wanted) {
  check(wanted <= best_isa(), "this CPU offers ", name_of(best_isa()), ", not ", name_of(wanted));
  current().store(static_cast<int>(wanted));
}

void* allocate(size_t bytes) {
#ifdef DISTAYA_SANITIZE
  void* exact = nullptr;  // no padding, which would hide what reaches over the end
  if (posix_memalign(&exact, 64, bytes) != 0) throw std::bad_alloc();
  return exact;
#else
  constexpr size_t kHuge = size_t{2} << 20;
  const size_t alignment = bytes >= kHuge ? kHuge : 64;
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* p = std::aligned_alloc(alignment, rounded ? rounded : alignment);
  if (!p) throw std::bad_alloc();
  if (alignment == kHuge) madvise(p, rounded, MADV_HUGEPAGE);  // a hint; failure costs only speed
  return p;
#endif
}

}  // namespace distaya::cpu
