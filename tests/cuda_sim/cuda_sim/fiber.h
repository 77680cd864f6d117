// A stack of its own for each thread of a block.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace cuda_sim {

inline constexpr int kMostThreads = 1024;
inline constexpr size_t kStack = size_t{256} << 10;  // address space; pages come when touched

// All stacks lie in one range, so that a kernel's own variables are told by their address.
struct Stacks {
  uint8_t* base;

  static const Stacks& get();

  bool hold(uintptr_t at) const {
    return at - reinterpret_cast<uintptr_t>(base) < kStack * kMostThreads;
  }
};

class Fiber {
 public:
  // Will run entry() on stack `number` when first entered. entry never returns.
  void prepare(int number, void (*entry)());
  void enter();  // from the scheduler; comes back when the fiber leaves
  void leave();  // back to the scheduler

 private:
#ifdef __x86_64__
  void* stack_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace cuda_sim
