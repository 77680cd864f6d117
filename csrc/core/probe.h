// What `distaya doctor` and the benches ask the machine: measured CPU peaks, the state of CUDA.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "core/tensor.h"

namespace distaya::probe {

// Gflop/s of one thread issuing nothing but FMAs on registers, on the instruction set in force:
// {"fp32": ..., "bf16_dot": ... (0 without AVX512-BF16), "int8_dot": ... (Gop/s; 0 without
// AVX512-VNNI)}: the ceilings of every kernel here.
std::map<std::string, double> peak();

// Reads t (uint8, on the CPU) once with all threads and returns the xor of its whole 64-byte lines:
// how fast memory can be read. A tail shorter than a line is left out.
uint64_t read(const Tensor& t);

// {"driver": n, "runtime": n, "devices": n, "status": sentence, "device0": name, ...} as text.
std::map<std::string, std::string> cuda_status();

// Reads four borrowed tensors' shapes: the cheapest possible call, for measuring the border itself.
int64_t touch(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& d);

}  // namespace distaya::probe
