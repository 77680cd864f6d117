#include <chrono>

#include "core/probe.h"

#define DISTAYA_ISA_FILE "core/probe_cpu.cpp"
#include "core/foreach_isa.h"

#ifdef DISTAYA_ISA_PASS

namespace distaya::DISTAYA_ISA {
namespace {

constexpr int kChains =
    kLanes == 16 ? 16 : 10;  // independent FMAs in flight: latency x ports and spare
constexpr int64_t kSteps = 400000;

// The accumulators of one loop, copied into registers and back: through the array they would be
// stored at every step, and the loop would measure stores.
struct Chains {
  vf v[kChains];
};

template <class Step>
double best_rate(double flops_per_step, const Step& run) {
  double best = 0;
  for (int trial = 0; trial < 5;
       ++trial) {  // best, not mean: the ceiling is what noise takes away from
    const auto start = std::chrono::steady_clock::now();
    run();
    const std::chrono::duration<double> s = std::chrono::steady_clock::now() - start;
    best = std::max(best, flops_per_step * kSteps / s.count() * 1e-9);
  }
  return best;
}

double fp32_peak() {
  Chains acc;
  for (int c = 0; c < kChains; ++c) acc.v[c] = splat(1.0f + c);
  vf a = splat(0.999999f), b = splat(1e-7f);
  asm volatile("" : "+m"(a), "+m"(b));  // opaque: the loop must not fold away
  const double rate = best_rate(2.0 * kLanes * kChains, [&] {
    Chains in = acc;
    for (int64_t i = 0; i < kSteps; ++i)
#pragma GCC unroll 16
      for (int c = 0; c < kChains; ++c) in.v[c] = fma(in.v[c], a, b);
    acc = in;
  });
  volatile float sink = 0;
  for (int c = 0; c < kChains; ++c) sink = sink + sum(acc.v[c]);
  return rate;
}

double bf16_peak() {
#if DISTAYA_LANES == 16
  Chains acc;
  for (int c = 0; c < kChains; ++c) acc.v[c] = splat(1.0f + c);
  __m512i ones = _mm512_set1_epi32(0x3f803f80);
  asm volatile("" : "+m"(ones));
  const double rate = best_rate(4.0 * kLanes * kChains, [&] {
    Chains in = acc;
    const __m512bh one = (__m512bh)ones;
    for (int64_t i = 0; i < kSteps; ++i)
#pragma GCC unroll 16
      for (int c = 0; c < kChains; ++c) in.v[c] = (vf)_mm512_dpbf16_ps((__m512)in.v[c], one, one);
    acc = in;
  });
  volatile float sink = 0;
  for (int c = 0; c < kChains; ++c) sink = sink + sum(acc.v[c]);
  return rate;
#else
  return 0;  // no bf16 dot instruction below AVX512-BF16
#endif
}

double int8_peak() {
#if DISTAYA_LANES == 16
  struct IntChains {
    __m512i v[kChains];
  } acc;

  for (int c = 0; c < kChains; ++c) acc.v[c] = _mm512_set1_epi32(c);
  __m512i ones = _mm512_set1_epi8(1);
  asm volatile("" : "+m"(ones));
  const double rate = best_rate(8.0 * kLanes * kChains, [&] {
    IntChains in = acc;
    const __m512i one = ones;
    for (int64_t i = 0; i < kSteps; ++i)
#pragma GCC unroll 16
      for (int c = 0; c < kChains; ++c) in.v[c] = _mm512_dpbusd_epi32(in.v[c], one, one);
    acc = in;
  });
  volatile float sink = 0;
  for (int c = 0; c < kChains; ++c) sink = sink + sum((vf)acc.v[c]);
  return rate;
#else
  return 0;  // no int8 dot instruction below AVX512-VNNI
#endif
}

}  // namespace

std::map<std::string, double> peak() {
  return {{"fp32", fp32_peak()}, {"bf16_dot", bf16_peak()}, {"int8_dot", int8_peak()}};
}

}  // namespace distaya::DISTAYA_ISA

#else

namespace distaya::probe {

std::map<std::string, double> peak() {
  switch (cpu::isa()) {
    case cpu::Isa::avx512: return avx512::peak();
    case cpu::Isa::avx2: return avx2::peak();
    default: return portable::peak();
  }
}

int64_t touch(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& d) {
  return a.numel() + b.numel() + c.numel() + d.numel();
}

#ifndef DISTAYA_CUDA
std::map<std::string, std::string> cuda_status() {
  return {
      {"status", "this build has no CUDA kernels (built without nvcc or with DISTAYA_CUDA=OFF)"}};
}
#endif

}  // namespace distaya::probe

#endif
