#include "cuda_sim/fiber.h"

#include <sys/mman.h>

#include <stdexcept>

namespace cuda_sim {

const Stacks& Stacks::get() {
  static const Stacks stacks = [] {
    void* base = mmap(nullptr, kStack * kMostThreads, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) throw std::runtime_error("no address space for the simulator's stacks");
    for (int i = 0; i < kMostThreads; ++i)  // an overflow ends in a crash, not in a neighbour
      mprotect(static_cast<uint8_t*>(base) + i * kStack, 4096, PROT_NONE);
    return Stacks{static_cast<uint8_t*>(base)};
  }();
  return stacks;
}

#ifdef __x86_64__

// Saves what a callee must keep, changes stacks, restores.
extern "C" void cuda_sim_switch(void** save, void* load);
asm(R"(
.text
.hidden cuda_sim_switch
.globl cuda_sim_switch
.type cuda_sim_switch, @function
cuda_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_sim_switch, .-cuda_sim_switch
)");

static void* scheduler_stack;

void Fiber::prepare(int number, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(Stacks::get().base + (number + 1) * kStack);
  top[-1] = nullptr;  // entry's return address
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  stack_ = top - 8;
}

void Fiber::enter() { cuda_sim_switch(&scheduler_stack, stack_); }

void Fiber::leave() { cuda_sim_switch(&stack_, scheduler_stack); }

#else

static ucontext_t scheduler_context;

void Fiber::prepare(int number, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = Stacks::get().base + number * kStack;
  context_.uc_stack.ss_size = kStack;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::enter() { swapcontext(&scheduler_context, &context_); }

void Fiber::leave() { swapcontext(&context_, &scheduler_context); }

#endif

}  // namespace cuda_sim
