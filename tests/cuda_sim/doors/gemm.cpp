// core/gemm.cuh has no room of its own: this door lets a test call it with any strides.
#include <string>

#include "core/gemm_grid.cuh"
#include "cuda_sim/memory.h"

// Sizes, strides and flags in the order of struct Gemm; floats of A, B and C. Returns what went
// wrong, or an empty string.
extern "C" __attribute__((visibility("default"))) const char* gemm_door(const int64_t* sizes,
                                                                        float alpha, const float* A,
                                                                        const float* B, float* C,
                                                                        const int64_t* floats) {
  static std::string wrong;
  wrong.clear();
  cuda_sim::admit(A, floats[0] * sizeof(float), "A");
  cuda_sim::admit(B, floats[1] * sizeof(float), "B");
  cuda_sim::admit(C, floats[2] * sizeof(float), "C");
  try {
    distaya::cuda::gemm({.m = sizes[0],
                         .n = sizes[1],
                         .k = sizes[2],
                         .alpha = alpha,
                         .A = A,
                         .a_row = sizes[3],
                         .a_col = sizes[4],
                         .B = B,
                         .b_row = sizes[5],
                         .b_col = sizes[6],
                         .C = C,
                         .ldc = sizes[7],
                         .upper_only = sizes[8] != 0,
                         .overwrite = sizes[9] != 0,
                         .lower_a = sizes[10] != 0},
                        nullptr);
  } catch (const std::exception& error) {
    wrong = error.what();
  }
  return wrong.c_str();
}

extern "C" __attribute__((visibility("default"))) int gemm_takes_large_tiles(int64_t m, int64_t n,
                                                                             int upper) {
  return distaya::cuda::large_tiles(m, n, upper != 0);
}
