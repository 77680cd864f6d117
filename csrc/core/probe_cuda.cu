#include <cuda_runtime.h>

#include "core/probe.h"

namespace distaya::probe {

// Never throws: a machine without GPU or driver is an ordinary machine.
std::map<std::string, std::string> cuda_status() {
  std::map<std::string, std::string> out;
  int driver = 0, runtime = 0, devices = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  out["driver"] = std::to_string(driver);
  out["runtime"] = std::to_string(runtime);
  const cudaError_t status = driver == 0 ? cudaErrorNoDevice : cudaGetDeviceCount(&devices);
  cudaGetLastError();
  out["devices"] = std::to_string(devices);
  if (driver == 0)
    out["status"] = "no NVIDIA driver on this machine; CPU kernels run";
  else if (status == cudaErrorInsufficientDriver)
    out["status"] = "the NVIDIA driver is too old for the CUDA runtime inside this wheel";
  else if (status != cudaSuccess)
    out["status"] = cudaGetErrorString(status);
  else
    out["status"] = "ok";
  for (int i = 0; i < devices; ++i) {
    cudaDeviceProp p;
    if (cudaGetDeviceProperties(&p, i) != cudaSuccess) continue;
    out["device" + std::to_string(i)] = std::string(p.name) + ", sm_" + std::to_string(p.major) +
                                        std::to_string(p.minor) + ", " +
                                        std::to_string(p.totalGlobalMem >> 20) + " MiB";
  }
  return out;
}

}  // namespace distaya::probe
