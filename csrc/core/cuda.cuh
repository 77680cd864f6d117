// Device and launch vocabulary shared by the CUDA rooms.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <source_location>

#include "core/tensor.h"

namespace distaya::cuda {

// CUDA failures are the machine's, not the caller's: RuntimeError with the place it happened.
inline void check_cuda(cudaError_t status,
                       const std::source_location& where = std::source_location::current()) {
  if (status == cudaSuccess) return;
  std::ostringstream text;
  text << "CUDA error '" << cudaGetErrorString(status) << "' in " << where.function_name() << " ("
       << where.file_name() << ":" << where.line() << ")";
  throw std::runtime_error(text.str());
}

inline void check_launch(const std::source_location& where = std::source_location::current()) {
  check_cuda(cudaGetLastError(), where);
}

// Selects the tensor's device for the scope; the static runtime has its own idea of "current".
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&before_));
    if (device != before_) check_cuda(cudaSetDevice(device));
  }

  ~DeviceGuard() { cudaSetDevice(before_); }

  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

inline cudaStream_t raw(Stream s) { return static_cast<cudaStream_t>(s); }

template <class T>
DISTAYA_HD constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// Grids are 32-bit in x: kernels that may exceed that stride over their work instead.
inline unsigned grid_of(int64_t blocks, int64_t most = 1 << 30) {
  return static_cast<unsigned>(blocks < most ? (blocks > 0 ? blocks : 1) : most);
}

__device__ inline float load_float(const float* p) { return *p; }

__device__ inline float load_float(const bf16* p) { return to_float(*p); }

__device__ inline float load_float(const f16* p) { return __half2float(__ushort_as_half(p->bits)); }

__device__ inline void store_float(float* p, float x) { *p = x; }

__device__ inline void store_float(bf16* p, float x) {
  p->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

__device__ inline void store_float(f16* p, float x) {
  p->bits = __half_as_ushort(__float2half_rn(x));
}

inline constexpr unsigned kFullWarp = 0xffffffffu;

template <class T>
__device__ T warp_sum(T x) {  // all lanes get the total; fixed tree, so the same bits every run
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(kFullWarp, x, d);
  return x;
}

}  // namespace distaya::cuda
