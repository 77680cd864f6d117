// Every instruction that CUDA C++ has no name for, behind a plain function. No other CUDA
// file contains asm. Warp-wide ones must be called by all 32 lanes. PTX ISA 8.5, "Matrix
// multiply-accumulate operation using mma / mma.sp instruction", "Data movement: cp.async" and
// "Asynchronous warpgroup level matrix instructions".
//
// The tests' simulator (tests/cuda_sim) has the same functions for the host; what is written here
// about an instruction is what it executes and checks.
#pragma once

#include "core/cuda.cuh"

// wgmma exists on sm_90a alone; kernels that use it are compiled to nothing elsewhere.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(DISTAYA_CUDA_SIM)
#define DISTAYA_WGMMA 1
#endif

#ifdef DISTAYA_CUDA_SIM
#include "cuda_sim/ptx.h"
#else

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

// D += A B in tf32 with fp32 sums; the last 13 bits of an operand are not looked at.
//   A [16, 8]  a[0] row g, column c      a[1] row g + 8, the same
//              a[2] row g, column c + 4  a[3] row g + 8, the same
//   B [8, 8]   b0 row c, b1 row c + 4 of column g; D as of mma
__device__ inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8: 16
// bytes, aligned to 16. out[i]: of matrix i, row g, columns 2c and 2c + 1.
__device__ inline void load_matrices(uint32_t (&out)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from)
               : "memory");
}

// The same, each matrix transposed: out[i] holds rows 2c and 2c + 1 of column g.
__device__ inline void load_transposed(uint32_t (&out)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from)
               : "memory");
}

// (a & mask) | b in one instruction; of two constants the compiler would make two.
template <uint32_t mask>
__device__ inline uint32_t and_or(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "n"(mask), "r"(b));
  return d;
}

// a + b of two packed 16-bit floats.
template <class T>
__device__ inline uint32_t add2(uint32_t a, uint32_t b);

template <>
__device__ inline uint32_t add2<f16>(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("add.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

template <>
__device__ inline uint32_t add2<bf16>(uint32_t a, uint32_t b) {
  uint32_t d;  // a * 1 + b: sm_80 multiplies and adds bf16 but has no plain sum
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3f803f80u), "r"(b));
  return d;
}

// a * b of two packed 16-bit floats.
template <class T>
__device__ inline uint32_t multiply2(uint32_t a, uint32_t b);

template <>
__device__ inline uint32_t multiply2<f16>(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

template <>
__device__ inline uint32_t multiply2<bf16>(uint32_t a, uint32_t b) {
  uint32_t d;  // a * b - 0, for sm_80
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
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

// 16 bytes of which the first `bytes` (0..16) are read and the rest are zeros. Both addresses are
// aligned to 16, also where nothing is read.
__device__ inline void copy_async_part(void* shared, const void* global, int bytes) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(to), "l"(global), "r"(bytes)
               : "memory");
}

// 16 bytes, or as many zeros where `there` is false.
__device__ inline void copy_async_or_zero(void* shared, const void* global, bool there) {
  copy_async_part(shared, global, there ? 16 : 0);
}

// 4 bytes, or as many zeros where `there` is false; both aligned to 4.
__device__ inline void copy_async_word(void* shared, const void* global, bool there) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :
               : "r"(to), "l"(global), "r"(there ? 4 : 0)
               : "memory");
}

// Closes this thread's group of copies.
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Waits until at most `pending` of this thread's latest groups are under way.
template <int pending>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(pending) : "memory");
}

// threadIdx.x, read where this stands: what is computed from it occupies no register before.
__device__ inline unsigned thread_anew() {
  unsigned d;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(d));
  return d;
}

// The 128 bytes around this address to the L2 cache. Changes nothing that can be seen: allowed also
// while another kernel may still write there.
__device__ inline void prefetch(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" : : "l"(global));
}

// A kernel that was launched `early` (core/cuda.cuh): returns when the kernels before it in the
// stream are done and their writes are seen.
__device__ inline void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}

// From here on the next kernel of the stream may start, if it was launched `early`. All blocks must
// have said so, or ended.
__device__ inline void let_later_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
}

// ---- sm_90a: products of a warpgroup (four neighbouring warps, the first a multiple of 4) ----

#ifdef DISTAYA_WGMMA

// This thread's writes to shared memory (plain ones, and asynchronous copies it waited for) become
// visible to products. Every writer calls it, then the block synchronises, then products may start.
__device__ inline void fence_for_products() {
  asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
}

// Before the first product, and before one whose A or D registers were written by other
// instructions since the last.
__device__ inline void product_fence() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }

// Closes this warpgroup's group of products.
__device__ inline void product_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
}

// Waits until at most `pending` of the latest groups are under way. Until then D is not there, and
// neither A's registers nor B's shared memory may be written.
template <int pending>
__device__ inline void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(pending) : "memory");
}

// Operand B [k, n] of 16-bit elements in shared memory as n rows of 64 consecutive k (128 bytes),
// rows 128 bytes apart: chunk c of 16 bytes of row r lies at r * 128 + 16 * (c ^ r % 8), and the
// whole begins at a multiple of 1024. `at`: the beginning, plus 32 bytes for each 16 k further in.
__device__ inline uint64_t operand_b(const void* at) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(at));
  // 8 rows are 1024 bytes; the leading offset is not used with this swizzle (type 1 in bits 62, 63)
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 |
         static_cast<uint64_t>((from & 0x3ffffu) >> 4);
}

// Products (sqgemm): D [64, n] = or += A [64, 16] B [16, n]; warp w of the four has rows 16 w ..
// 16 w + 15 of A, in registers as in mma, and of D: d[4 i + e] is element e of mma's D for columns
// 8 i .. 8 i + 7. Sparse: A is [64, 32], registers and metadata as in mma_sparse, and a row of B
// takes 64 bytes. `add` false: D is overwritten. n: 64 or 128.

// D's operands, and their numbers in the instruction's text.
#define DISTAYA_D8(i)                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define DISTAYA_D32(i) DISTAYA_D8(i), DISTAYA_D8(i + 8), DISTAYA_D8(i + 16), DISTAYA_D8(i + 24)
#define DISTAYA_D64 DISTAYA_D32(0), DISTAYA_D32(32)
#define DISTAYA_TO32                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DISTAYA_TO64                                                                           \
  DISTAYA_TO32                                                                                 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49" \
  ", %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// Behind D: A's four registers, B's descriptor, add; sparse: also the metadata and its selector.
// The instruction's last numbers say: A and B as they are, B's rows along k.
#define DISTAYA_PRODUCT(shape, type, D, a_text, b_text, add_text, ...)                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add_text ", 0;\nwgmma.mma_async" shape \
               ".f32." type "." type " {" a_text "}, " b_text ", p, 1, 1, 0;\n}"          \
               : D                                                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                      \
                 "r"(int{add})__VA_OPT__(, ) __VA_ARGS__)

template <class T, int n>
__device__ inline void wgmma(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  constexpr bool bfloat = dtype_of<T> == Dtype::bf16;
  static_assert(n == 64 || n == 128);
  if constexpr (n == 64 && bfloat)
    DISTAYA_PRODUCT(".sync.aligned.m64n64k16", "bf16", DISTAYA_D32(0),
                    DISTAYA_TO32 "}, {%32, %33, %34, %35", "%36", "%37");
  else if constexpr (n == 64)
    DISTAYA_PRODUCT(".sync.aligned.m64n64k16", "f16", DISTAYA_D32(0),
                    DISTAYA_TO32 "}, {%32, %33, %34, %35", "%36", "%37");
  else if constexpr (bfloat)
    DISTAYA_PRODUCT(".sync.aligned.m64n128k16", "bf16", DISTAYA_D64,
                    DISTAYA_TO64 "}, {%64, %65, %66, %67", "%68", "%69");
  else
    DISTAYA_PRODUCT(".sync.aligned.m64n128k16", "f16", DISTAYA_D64,
                    DISTAYA_TO64 "}, {%64, %65, %66, %67", "%68", "%69");
}

template <class T, int n, int selector>
__device__ inline void wgmma_sparse(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b,
                                    uint32_t meta, bool add) {
  constexpr bool bfloat = dtype_of<T> == Dtype::bf16;
  static_assert(n == 64 || n == 128);
  if constexpr (n == 64 && bfloat)
    DISTAYA_PRODUCT(".sp.sync.aligned.m64n64k32", "bf16", DISTAYA_D32(0),
                    DISTAYA_TO32 "}, {%32, %33, %34, %35", "%36, %38, %39", "%37", "r"(meta),
                    "n"(selector));
  else if constexpr (n == 64)
    DISTAYA_PRODUCT(".sp.sync.aligned.m64n64k32", "f16", DISTAYA_D32(0),
                    DISTAYA_TO32 "}, {%32, %33, %34, %35", "%36, %38, %39", "%37", "r"(meta),
                    "n"(selector));
  else if constexpr (bfloat)
    DISTAYA_PRODUCT(".sp.sync.aligned.m64n128k32", "bf16", DISTAYA_D64,
                    DISTAYA_TO64 "}, {%64, %65, %66, %67", "%68, %70, %71", "%69", "r"(meta),
                    "n"(selector));
  else
    DISTAYA_PRODUCT(".sp.sync.aligned.m64n128k32", "f16", DISTAYA_D64,
                    DISTAYA_TO64 "}, {%64, %65, %66, %67", "%68, %70, %71", "%69", "r"(meta),
                    "n"(selector));
}

#undef DISTAYA_D8
#undef DISTAYA_D32
#undef DISTAYA_D64
#undef DISTAYA_TO32
#undef DISTAYA_TO64
#undef DISTAYA_PRODUCT

// Stands before the product_fence of products that read A: what writes it may not move behind.
template <int m>
__device__ inline void product_operand(uint32_t (&a)[m]) {
#pragma unroll
  for (int i = 0; i < m; ++i) asm volatile("" : "+r"(a[i]) : : "memory");
}

// Stands behind the product_wait that makes D valid: what reads D may not move ahead of it.
template <int m>
__device__ inline void product_done(float (&d)[m]) {
#pragma unroll
  for (int i = 0; i < m; ++i) asm volatile("" : "+f"(d[i]) : : "memory");
}

#endif  // DISTAYA_WGMMA

}  // namespace distaya::ptx

#endif  // DISTAYA_CUDA_SIM
