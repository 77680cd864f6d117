#ifdef DISTAYA_SANITIZE

#include "core/planted.h"

#include "core/check.h"
#include "core/cpu.h"

namespace distaya {
namespace {

volatile int64_t shared_sum = 0;  // volatile, or nobody would ever store it

void overflow() {
  constexpr int64_t kSize = 17;  // no multiple of anything: padding would hide the fault
  const auto memory = cpu::scratch<float>(kSize);
  volatile float* at = memory.get();
  at[kSize] = 1;
}

void undefined() {
  volatile int32_t most = INT32_MAX;
  most = most + 1;
}

// Waits until two threads are here. Relaxed: they meet, but nothing orders what they do.
void meet(std::atomic<int>& here) {
  here.fetch_add(1, std::memory_order_relaxed);
  while (here.load(std::memory_order_relaxed) < 2) {
  }
  for (int64_t i = 0; i < 1000; ++i) shared_sum = shared_sum + i;
}

void race() {
  check(cpu::threads() > 1, "a race needs two threads, and there is ", cpu::threads());
  std::atomic<int> here{0};
  cpu::parallel_for(2, [&](int64_t) { meet(here); });
}

void callers() {
  static std::atomic<int> here{0};
  meet(here);
}

}  // namespace

void plant(const std::string& fault) {
  if (fault == "overflow") return overflow();
  if (fault == "undefined") return undefined();
  if (fault == "race") return race();
  if (fault == "callers") return callers();
  fail("there is no fault '", fault, "' to plant");
}

}  // namespace distaya

#endif
