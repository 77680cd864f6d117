#include <atomic>
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

// The rate of step(acc) on kChains independent vectors. They are born and summed inside the timed
// body: shared with the outside they would be stored at every step, and the loop would measure
// stores.
template <class V, class Start, class Step>
double chained_rate(double flops_per_chain, const Start& start, const Step& step) {
  volatile float sink = 0;
  return best_rate(flops_per_chain * kChains, [&] {
    V acc[kChains];
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) acc[c] = start(c);
    for (int64_t i = 0; i < kSteps; ++i)
#pragma GCC unroll 16
      for (int c = 0; c < kChains; ++c) acc[c] = step(acc[c]);
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) sink = sink + sum((vf)acc[c]);
  });
}

// The operands are made opaque, or the loops would fold away.

double fp32_peak() {
  vf factor = splat(0.999999f), term = splat(1e-7f);
  asm volatile("" : "+m"(factor), "+m"(term));
  return chained_rate<vf>(
      2.0 * kLanes, [](int c) { return splat(1.0f + c); },
      [=](vf acc) __attribute__((always_inline)) { return fma(acc, factor, term); });
}

double bf16_peak() {
#if DISTAYA_LANES == 16
  __m512i ones = _mm512_set1_epi32(0x3f803f80);
  asm volatile("" : "+m"(ones));
  return chained_rate<__m512>(
      4.0 * kLanes, [](int c) { return _mm512_set1_ps(1.0f + c); },
      [=](__m512 acc) __attribute__((always_inline)) {
        return _mm512_dpbf16_ps(acc, (__m512bh)ones, (__m512bh)ones);
      });
#else
  return 0;  // no bf16 dot instruction below AVX512-BF16
#endif
}

double int8_peak() {
#if DISTAYA_LANES == 16
  __m512i ones = _mm512_set1_epi8(1);
  asm volatile("" : "+m"(ones));
  return chained_rate<__m512i>(
      8.0 * kLanes, [](int c) { return _mm512_set1_epi32(c); },
      [=](__m512i acc)
          __attribute__((always_inline)) { return _mm512_dpbusd_epi32(acc, ones, ones); });
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

// One xor per 64 bytes on four chains, and each thread asks for its memory 4 KB early, across the
// pages where the hardware's prefetcher gives up: nothing that computes can read faster.
uint64_t read(const Tensor& t) {
  t.need_contiguous("t");
  const int64_t bytes = t.numel();
  const uint8_t* data = t.as<uint8_t>("t");
  constexpr int64_t kPiece = 1 << 20;
  std::atomic<uint64_t> all{0};
  cpu::parallel_for((bytes + kPiece - 1) / kPiece, [&](int64_t piece) {
    const int64_t last = std::min(bytes, (piece + 1) * kPiece) - 64;
    uint64_t chain[4] = {};
    for (int64_t i = piece * kPiece; i <= last; i += 64) {
      __builtin_prefetch(data + i + 4096);
      uint64_t line[8];
      std::memcpy(line, data + i, 64);
      for (int c = 0; c < 4; ++c) chain[c] ^= line[c] ^ line[c + 4];
    }
    all.fetch_xor(chain[0] ^ chain[1] ^ chain[2] ^ chain[3], std::memory_order_relaxed);
  });
  return all;
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
