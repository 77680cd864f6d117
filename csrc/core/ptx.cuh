// Every instruction that CUDA C++ has no name for, behind a plain function. No other CUDA
// file contains asm. Warp-wide ones must be called by all 32 lanes. PTX ISA 8.5, "Matrix
// multiply-accumulate operation using mma / mma.sp instruction" and "Data movement: cp.async".
#pragma once

#include "core/cuda.cuh"

namespace distaya::ptx {

// D += A B, fp32 sums. With g = lane / 4, c = lane % 4 and two values to a register, low half
// first:
//   A [16, 16]  a[0] row g, columns 2c, 2c+1      a[1] row g + 8, the same
//               a[2] row g, columns 2c+8, 2c+9    a[3] row g + 8, the same
//   B [16, 8]   b0 rows 2c, 2c+1 of column g      b1 rows 2c+8, 2c+9
//   D [16, 8]   d[0], d[1] row g, columns 2c, 2c+1     d[2], d[3] row g + 8, the same
template <class T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void mma<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// D += A B with A [16, 32] 2:4 sparse. a: the kept half [16, 16], laid out as in mma. b[r]: rows
// 2c + 8r, 2c + 8r + 1 of column g. meta, read from lanes 4g + 2 selector + {0, 1}: the first of
// them has columns 0..15, the second 16..31; low half row g, high half row g + 8; nibble t is group
// t of those four: its lower kept index, then its higher one times 4.
template <class T, int selector>
__device__ inline void mma_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                  uint32_t meta) {
  if constexpr (dtype_of<T> == Dtype::bf16)
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
          "r"(meta), "n"(selector));
  else
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
          "r"(meta), "n"(selector));
}

// a - b of two packed 16-bit floats.
template <class T>
__device__ inline uint32_t subtract2(uint32_t a, uint32_t b);

template <>
__device__ inline uint32_t subtract2<f16>(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

template <>
__device__ inline uint32_t subtract2<bf16>(uint32_t a, uint32_t b) {
  uint32_t d;  // a * 1 - b: sm_80 multiplies and adds bf16 but has no plain difference
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3f803f80u), "r"(b ^ 0x80008000u));
  return d;
}

// Two floats rounded to bf16, `low` in the low half.
__device__ inline uint32_t pack_bf16(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// Policy for data that is read once: it leaves the L2 cache first.
__device__ inline uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// 16 bytes from global to shared memory, both aligned to 16; there after copy_wait.
__device__ inline void copy_async(void* shared, const void* global, uint64_t policy) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;"
               :
               : "r"(to), "l"(global), "l"(policy)
               : "memory");
}

// The same; 16 zero bytes, and nothing is read, where `there` is false.
__device__ inline void copy_async_or_zero(void* shared, const void* global, bool there) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(to), "l"(global), "r"(there ? 16 : 0)
               : "memory");
}

// Closes this thread's group of copies.
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Waits until at most `pending` of this thread's latest groups are under way.
template <int pending>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(pending) : "memory");
}

}  // namespace distaya::ptx
