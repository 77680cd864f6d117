// Compiles the file named by DISTAYA_ISA_FILE once per instruction set, each time in its own
// namespace (distaya::avx512, ::avx2, ::portable) inside a target region. A room's _cpu.cpp reads:
//
//   #define DISTAYA_ISA_FILE "room/room_cpu.cpp"
//   #include "core/foreach_isa.h"
//   #ifdef DISTAYA_ISA_PASS
//   namespace distaya::DISTAYA_ISA { ...kernels, anonymous namespace for helpers... }
//   #else
//   namespace distaya { ...dispatch on cpu::isa()... }
//   #endif
//
// A target region (not -mavx512 for the file) keeps AVX-512 copies of std:: inlines out of generic
// code.
#ifndef DISTAYA_ISA_PASS

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/cpu.h"
#include "core/dtype.h"

#define DISTAYA_ISA_PASS 1

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16", \
                   "avx512vbmi,avx512vbmi2,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#define DISTAYA_ISA avx512
#define DISTAYA_LANES 16
#include "core/simd.h"
#include DISTAYA_ISA_FILE
#undef DISTAYA_ISA
#undef DISTAYA_LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define DISTAYA_ISA avx2
#define DISTAYA_LANES 8
#include "core/simd.h"
#include DISTAYA_ISA_FILE
#undef DISTAYA_ISA
#undef DISTAYA_LANES
#pragma GCC pop_options

#define DISTAYA_ISA portable
#define DISTAYA_LANES 4
#include "core/simd.h"
#include DISTAYA_ISA_FILE
#undef DISTAYA_ISA
#undef DISTAYA_LANES

#undef DISTAYA_ISA_PASS
#endif
