// Tensor: a borrowed view of somebody else's memory. Kernels and doors see this and nothing of torch.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "core/check.h"
#include "core/dtype.h"

namespace distaya {

// An opaque cudaStream_t, so that CPU-only code needs no CUDA header.
using Stream = void*;

struct Tensor {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  bool on_cuda = false;
  int device = 0;  // CUDA ordinal
  int ndim = 0;
  const int64_t* sizes = nullptr;    // [ndim], valid during the call only
  const int64_t* strides = nullptr;  // [ndim], in elements

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= sizes[i];
    return n;
  }

  std::string describe() const {
    std::ostringstream text;
    text << name_of(dtype) << " [";
    for (int i = 0; i < ndim; ++i) text << (i ? ", " : "") << sizes[i];
    text << "] on " << (on_cuda ? "cuda" : "cpu");
    return text.str();
  }

  // The sizes as an array to be destructured: auto [rows, cols] = W.shape<2>("W").
  template <int N>
  std::array<int64_t, N> shape(const char* name) const {
    check(ndim == N, name, " must have ", N, " dimensions but is ", describe());
    std::array<int64_t, N> out;
    for (int i = 0; i < N; ++i) out[i] = sizes[i];
    return out;
  }

  bool contiguous() const {
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (sizes[i] != 1 && strides[i] != expected) return false;
      expected *= sizes[i];
    }
    return true;
  }

  void need_contiguous(const char* name) const {
    check(numel() == 0 || contiguous(), name, " (", describe(),
          ") is not contiguous; pass ", name, ".contiguous()");
  }

  // Typed pointer; refuses another dtype with a sentence.
  template <class T>
  T* as(const char* name) const {
    check(dtype == dtype_of<T>, name, " must be ", name_of(dtype_of<T>), " but is ", describe());
    check(reinterpret_cast<uintptr_t>(data) % sizeof(T) == 0, name, " is not aligned to ",
          sizeof(T), " bytes");
    return static_cast<T*>(data);
  }
};

inline void same_device(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name) {
  check(a.on_cuda == b.on_cuda && a.device == b.device, a_name, " (", a.describe(), ") and ",
        b_name, " (", b.describe(), ") are on different devices");
}

// torch's current stream of the tensor's device (defined in module.cpp, which knows the exchange API).
Stream stream_of(const Tensor& t);

#ifdef DISTAYA_CUDA
inline constexpr bool has_cuda = true;
#else
inline constexpr bool has_cuda = false;
#endif

}  // namespace distaya
