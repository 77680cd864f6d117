// What the compiler calls for each access of instrumented code: -fsanitize=thread announces loads
// and stores, -fsanitize=alignment misaligned ones. The sanitizers' own libraries are not linked.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cuda_sim/engine.h"

using cuda_sim::Access;
using cuda_sim::engine;
using cuda_sim::shadow;

#define CALLER reinterpret_cast<uintptr_t>(__builtin_return_address(0))

namespace {

inline void touch(Access access, const void* at, size_t bytes, uintptr_t pc) {
  if (engine.inside) shadow.touch(access, at, bytes, {{nullptr, 0}, pc});
}

}  // namespace

extern "C" {

void __tsan_init() {}

#define SIZE(n)                                                                          \
  void __tsan_read##n(void* p) { touch(Access::read, p, n, CALLER); }                    \
  void __tsan_write##n(void* p) { touch(Access::write, p, n, CALLER); }                  \
  void __tsan_unaligned_read##n(void* p) { touch(Access::read, p, n, CALLER); }          \
  void __tsan_unaligned_write##n(void* p) { touch(Access::write, p, n, CALLER); }        \
  void __tsan_volatile_read##n(void* p) { touch(Access::read, p, n, CALLER); }           \
  void __tsan_volatile_write##n(void* p) { touch(Access::write, p, n, CALLER); }         \
  void __tsan_unaligned_volatile_read##n(void* p) { touch(Access::read, p, n, CALLER); } \
  void __tsan_unaligned_volatile_write##n(void* p) { touch(Access::write, p, n, CALLER); }
SIZE(1)
SIZE(2)
SIZE(4)
SIZE(8)
SIZE(16)
#undef SIZE

void __tsan_read_range(void* p, size_t n) { touch(Access::read, p, n, CALLER); }

void __tsan_write_range(void* p, size_t n) { touch(Access::write, p, n, CALLER); }

void __tsan_vptr_update(void**, void*) {}

void __tsan_vptr_read(void**) {}

void __tsan_func_entry(void*) {}

void __tsan_func_exit() {}

// std::atomic in the host parts of the kernels' files.
#define ATOMIC(bits, type)                                                                         \
  type __tsan_atomic##bits##_load(const volatile type* p, int) {                                   \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                                \
  void __tsan_atomic##bits##_store(volatile type* p, type x, int) {                                \
    __atomic_store_n(p, x, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                \
  type __tsan_atomic##bits##_exchange(volatile type* p, type x, int) {                             \
    return __atomic_exchange_n(p, x, __ATOMIC_SEQ_CST);                                            \
  }                                                                                                \
  type __tsan_atomic##bits##_fetch_add(volatile type* p, type x, int) {                            \
    return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  type __tsan_atomic##bits##_fetch_sub(volatile type* p, type x, int) {                            \
    return __atomic_fetch_sub(p, x, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  type __tsan_atomic##bits##_fetch_or(volatile type* p, type x, int) {                             \
    return __atomic_fetch_or(p, x, __ATOMIC_SEQ_CST);                                              \
  }                                                                                                \
  type __tsan_atomic##bits##_fetch_xor(volatile type* p, type x, int) {                            \
    return __atomic_fetch_xor(p, x, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  type __tsan_atomic##bits##_fetch_and(volatile type* p, type x, int) {                            \
    return __atomic_fetch_and(p, x, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile type* p, type* old, type x, int,      \
                                                    int) {                                         \
    return __atomic_compare_exchange_n(p, old, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);      \
  }                                                                                                \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile type* p, type* old, type x, int, int) { \
    return __atomic_compare_exchange_n(p, old, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);      \
  }
ATOMIC(8, uint8_t)
ATOMIC(16, uint16_t)
ATOMIC(32, uint32_t)
ATOMIC(64, uint64_t)
#undef ATOMIC

void __tsan_atomic_thread_fence(int) {}

void __tsan_atomic_signal_fence(int) {}

// Layouts of GCC's calls: source place, type, logarithm of the alignment.
struct SourcePlace {
  const char* file;
  uint32_t line, column;
};

struct TypeMismatch {
  SourcePlace place;
  const void* type;
  uint8_t log_alignment;
};

void __ubsan_handle_type_mismatch_v1(const TypeMismatch* data, uintptr_t at) {
  if (!engine.inside) return;
  cuda_sim::violate("misaligned: " + shadow.describe(at) + " is not at a multiple of " +
                        std::to_string(1u << data->log_alignment) + " bytes",
                    {{data->place.file, static_cast<int>(data->place.line)}});
}

// __builtin_assume_aligned: place of the call, of the function's declaration, type.
void __ubsan_handle_alignment_assumption(const SourcePlace* place, uintptr_t at, uintptr_t multiple,
                                         uintptr_t) {
  if (!engine.inside) return;
  cuda_sim::violate("misaligned: " + shadow.describe(at) + " is not at a multiple of " +
                        std::to_string(multiple) + " bytes",
                    {{place->file, static_cast<int>(place->line)}});
}

// Blocks of memory that the kernels' files move at once: build.py sends their calls here.
void* cuda_sim_memcpy(void* to, const void* from, size_t n) {
  touch(Access::read, from, n, CALLER);
  touch(Access::write, to, n, CALLER);
  return memcpy(to, from, n);
}

void* cuda_sim_memmove(void* to, const void* from, size_t n) {
  touch(Access::read, from, n, CALLER);
  touch(Access::write, to, n, CALLER);
  return memmove(to, from, n);
}

void* cuda_sim_memset(void* to, int byte, size_t n) {
  touch(Access::write, to, n, CALLER);
  return memset(to, byte, n);
}
}
