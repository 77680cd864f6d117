// Textual part of sqgemm_cpu.cpp: 64 rows of y = x W^T with int8 activations.
//
// A group of columns (at most 128) is summed in integers, exactly; then
//   y = fma(scale of the weights, float(sum - zero * sum of the activations) * scale of the
//   activations, y),
// group by group from the left. So an output has the same bits on every instruction set, whatever
// the number of threads, and whichever tokens share the call.

#include "sqgemm/gemm.h"
#if DISTAYA_LANES == 16
#include "sqgemm/gemv.h"
#endif

template <Kind kind>
void int8_rows_of(const Format& f, const uint8_t* buffer, int64_t row_tile, const Quantized& x,
                  int64_t t0, int64_t t1, float* C) {
#if DISTAYA_LANES == 16
  switch (t1 - t0) {
    case 1: return gemv<kind, 1>(f, buffer, row_tile, x, t0, C);
    case 2: return gemv<kind, 2>(f, buffer, row_tile, x, t0, C);
    case 3: return gemv<kind, 3>(f, buffer, row_tile, x, t0, C);
    case 4: return gemv<kind, 4>(f, buffer, row_tile, x, t0, C);
    case 5: return gemv<kind, 5>(f, buffer, row_tile, x, t0, C);
    case 6: return gemv<kind, 6>(f, buffer, row_tile, x, t0, C);
    default: break;
  }
#endif
  gemm<kind>(f, buffer, row_tile, x, t0, t1, C);
}

// C [t1 - t0][64] = X W^T for tokens [t0, t1) and the 64 rows of a row tile, over all columns.
inline void int8_rows(const Format& f, const uint8_t* buffer, int64_t row_tile, const Quantized& x,
                      int64_t t0, int64_t t1, float* C) {
  const auto run = [&]<Kind kind>() { int8_rows_of<kind>(f, buffer, row_tile, x, t0, t1, C); };
  each_kind(f.kind, run);
}
