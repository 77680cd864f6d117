// Tensor: a borrowed view of somebody else's memory. Kernels and doors see this and nothing of
// torch.
#pragma once

#include <array>
#include <cstdint>
#include <ostream>

#include "core/check.h"
#include "core/dtype.h"

namespace distaya {

// An opaque cudaStream_t, so that CPU-only code needs no CUDA header.
using Stream = void*;

struct Tensor;
std::ostream& operator<<(std::ostream& out, const Tensor& t);  // "float32 [4, 5] on cpu"

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

  // The sizes as an array to be destructured: auto [rows, cols] = W.shape<2>("W").
  template <int N>
  std::array<int64_t, N> shape(const char* name) const {
    check(ndim == N, name, " must have ", N, " dimensions but is ", *this);
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
    check(numel() == 0 || contiguous(), name, " (", *this, ") is not contiguous; pass ", name,
          ".contiguous()");
  }

  // Typed pointer; refuses another dtype with a sentence.
  template <class T>
  T* as(const char* name) const {
    check(dtype == dtype_of<T>, name, " must be ", name_of(dtype_of<T>), " but is ", *this);
    return static_cast<T*>(data);
  }
};

inline std::ostream& operator<<(std::ostream& out, const Tensor& t) {
  out << name_of(t.dtype) << " [";
  for (int i = 0; i < t.ndim; ++i) out << (i ? ", " : "") << t.sizes[i];
  return out << "] on " << (t.on_cuda ? "cuda" : "cpu");
}

inline void same_device(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name) {
  check(a.on_cuda == b.on_cuda && a.device == b.device, a_name, " (", a, ") and ", b_name, " (", b,
        ") are on different devices");
}

// torch's current stream of the tensor's device (defined in module.cpp, which knows the exchange
// API).
Stream stream_of(const Tensor& t);

#ifdef DISTAYA_CUDA
inline constexpr bool has_cuda = true;
#else
inline constexpr bool has_cuda = false;
#endif

}  // namespace distaya
