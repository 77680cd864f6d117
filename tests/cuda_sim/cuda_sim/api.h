// What compiled kernels call: the engine as the stand-in headers and ptx.h see it.
#pragma once

#include <cstddef>
#include <cstdint>

// A function whose loads and stores are the simulator's own business, not the kernel's.
#define CUDA_SIM_PLAIN __attribute__((no_sanitize("thread", "alignment"))) inline

namespace cuda_sim {

struct Place {
  const char* file;
  int line;
};

// Indices do not change while a thread runs, so the compiler may keep them.
[[gnu::const]] unsigned thread_index(int axis);
[[gnu::const]] unsigned block_index(int axis);
[[gnu::const]] unsigned block_size(int axis);
[[gnu::const]] unsigned grid_size(int axis);
[[gnu::const]] int lane();
unsigned living_lanes();

void block_barrier(Place place);
int block_count(bool mine, Place place);  // threads of the block that said true
void warp_barrier(unsigned mask, Place place);
uint64_t shuffle(const char* what, unsigned mask, uint64_t mine, int from, int width, Place place);
unsigned ballot(const char* what, unsigned mask, bool mine, Place place);
unsigned match(unsigned mask, uint64_t mine, Place place);
void atomic_access(void* at, size_t bytes, Place place);

void* dynamic_shared();
size_t shared_address(const void* generic);  // 32-bit window address; only of shared memory

// ---- what ptx.h stands on ----

struct Shape {
  bool bf16, tf32;
  bool sparse;
  int selector;
};

// d += A B on the operand registers of PTX; n32 words of a, b words after each other.
void multiply(const Shape& shape, float* d, const uint32_t* a, const uint32_t* b, int b_words,
              uint32_t meta, Place place);
void load_matrices(uint32_t* out, const void* row, bool transposed, Place place);

void copy_async(void* shared, const void* global, int size, int bytes, Place place);
void copy_commit();
void copy_wait(int pending);

void wait_for_earlier();

void fence_for_products();
void product_fence();
void product_issue(const Shape& shape, int n, float* d, const uint32_t* a, uint64_t b,
                   uint32_t meta, bool add, Place place);
void product_commit();
void product_wait(int pending);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
float bf16_to_float(uint16_t bits);
uint16_t float_to_bf16(float x);

}  // namespace cuda_sim
