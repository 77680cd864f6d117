// Device and launch vocabulary shared by the CUDA rooms.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
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

// Compute capability of the current device, 90 for sm_90; asked once per device.
inline int capability() {
  static std::atomic<int> known[64];
  int device = 0, major = 0, minor = 0;
  check_cuda(cudaGetDevice(&device));
  if (device < 64 && known[device]) return known[device];
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (device < 64) known[device] = 10 * major + minor;
  return 10 * major + minor;
}

// Whether kernels wait for those ahead of them (ptx::wait_for_earlier) on the current device: not
// where it is newer than everything this was compiled for and runs the PTX of an older
// architecture, in which that instruction does not exist. Asked of one kernel for all, once per
// device.
inline bool waits_for_earlier(const void* kernel) {
  static std::atomic<int> known[64];  // 1 no, 2 yes
  int device = 0;
  check_cuda(cudaGetDevice(&device));
  if (device < 64 && known[device]) return known[device] == 2;
  bool waits = false;
  if (capability() >= 90) {
    cudaFuncAttributes code{};
    check_cuda(cudaFuncGetAttributes(&code, kernel));
    waits = code.ptxVersion >= 90;
  }
  if (device < 64) known[device] = waits ? 2 : 1;
  return waits;
}

inline cudaStream_t raw(Stream s) { return static_cast<cudaStream_t>(s); }

template <class T>
DISTAYA_HD constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// Arrays laid out one after the other in a workspace, each at a multiple of 256 bytes. With a null
// base only the bytes are counted.
struct Arena {
  void* base;
  int64_t bytes = 0;

  template <class T>
  T* take(int64_t count) {
    char* at = static_cast<char*>(base) + bytes;
    bytes += ceil_div<int64_t>(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return reinterpret_cast<T*>(at);
  }
};

// Every kernel is started here. `early`: it may begin while the kernel before it in the stream
// still runs (programmatic dependent launch, code for sm_90 and later; else nothing changes), so it
// must call ptx::wait_for_earlier before it touches anything that an earlier kernel writes, or
// reads where this one writes.
template <bool early = false, class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared, cudaStream_t stream,
            A&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  if (early && waits_for_earlier(reinterpret_cast<const void*>(kernel)))
    config.attrs = &attribute, config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...));
}

// Lets a kernel be launched with more than 48 KB of dynamic shared memory.
template <class... P>
void need_shared(void (*kernel)(P...), int bytes) {
  check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// A kernel's dynamic shared memory as an array of T, aligned for every use of it.
#ifdef DISTAYA_CUDA_SIM
#define DISTAYA_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(cuda_sim::dynamic_shared())
#else
#define DISTAYA_DYNAMIC_SHARED(T, name) extern __shared__ __align__(1024) T name[]
#endif

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
