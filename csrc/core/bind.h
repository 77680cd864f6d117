// The border: a pybind11 caster from torch.Tensor to Tensor over the DLPack C exchange API (torch
// >= 2.10). Included by module.cpp only. Borrowing one tensor costs tens of nanoseconds and copies
// nothing.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/cpu.h"
#include "core/dlpack.h"
#include "core/tensor.h"

#ifdef DISTAYA_CUDA_SIM  // the tests' simulator: host memory plays the device's
#include "cuda_sim/memory.h"
#endif

namespace distaya {

// What the caster needs from torch, looked up once, on the first tensor that crosses.
struct Border {
  PyTypeObject* tensor_type = nullptr;
  const dlpack::ExchangeApi* api = nullptr;
  PyObject* requires_grad = nullptr;  // interned attribute name

  static const Border& get() {
    static const Border border = open();
    return border;
  }

 private:
  static Border open() {
    const pybind11::object type = pybind11::module_::import("torch").attr("Tensor");
    if (!pybind11::hasattr(type, "__dlpack_c_exchange_api__"))
      throw std::runtime_error(
          "this torch has no DLPack C exchange API; distaya_ext needs torch >= 2.10");
    const pybind11::object capsule = type.attr("__dlpack_c_exchange_api__");
    Border b;
    b.api = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), dlpack::kExchangeCapsule));
    if (!b.api) throw pybind11::error_already_set();
    if (b.api->version.major != 1)
      throw std::runtime_error("torch speaks DLPack " + std::to_string(b.api->version.major) +
                               ".x; distaya_ext understands 1.x");
    b.tensor_type = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());  // kept for the process
    capsule.inc_ref();
    b.requires_grad = PyUnicode_InternFromString("requires_grad");
    return b;
  }
};

inline Dtype dtype_from(dlpack::DataType t) {
  const auto code = static_cast<dlpack::Code>(t.code);
  using enum dlpack::Code;
  if (t.lanes == 1) {
    if (code == floating && t.bits == 32) return Dtype::f32;
    if (code == bfloat && t.bits == 16) return Dtype::bf16;
    if (code == floating && t.bits == 16) return Dtype::f16;
    if (code == floating && t.bits == 64) return Dtype::f64;
    if (code == integer && t.bits == 64) return Dtype::i64;
    if (code == integer && t.bits == 32) return Dtype::i32;
    if (code == integer && t.bits == 8) return Dtype::i8;
    if (code == unsigned_integer && t.bits == 8) return Dtype::u8;
    if (code == boolean && t.bits == 8) return Dtype::boolean;
  }
  fail("no kernel takes a tensor of DLPack type code ", int(t.code), " with ", int(t.bits),
       " bits");
}

// CUDA does not survive fork(): what was a device in the parent is none in the child.
inline void refuse_after_fork() {
  static const int before = cpu::forks();  // when the first tensor on a GPU crossed
  check(before == cpu::forks(),
        "a tensor is on cuda in a process that was forked after CUDA was used, where CUDA cannot "
        "work; start it with multiprocessing's 'spawn' method");
}

// Fills `out` from a torch.Tensor; throws Error (ValueError) for one that must not be borrowed.
inline void borrow(PyObject* object, Tensor& out) {
  const Border& border = Border::get();
  dlpack::Tensor t;
  if (border.api->tensor_from_py(object, &t) != 0) {
    PyErr_Clear();
    fail("a tensor has no memory a kernel could read (a meta, sparse or wrapped tensor)");
  }
  out.ndim = t.ndim;
  out.sizes = t.shape;
  out.strides = t.strides;
  out.dtype = dtype_from(t.dtype);
  const auto device = static_cast<dlpack::DeviceType>(t.device.type);
  out.on_cuda = device == dlpack::DeviceType::cuda || device == dlpack::DeviceType::cuda_managed;
  out.device = t.device.id;
  check(out.on_cuda || device == dlpack::DeviceType::cpu || device == dlpack::DeviceType::cuda_host,
        "a tensor lives on a device (DLPack type ", t.device.type, ") that has no kernels");
  check(has_cuda || !out.on_cuda,
        "a tensor is on cuda but this build of distaya_ext has no CUDA kernels (see `distaya "
        "doctor`)");
  // A FakeTensor crosses silently with null data; writing through it would crash.
  check(t.data || out.numel() == 0, "a tensor of ", out.numel(),
        " elements has no data (fake tensor?)");
  out.data = static_cast<char*>(t.data) + t.byte_offset;
  check(out.numel() == 0 || reinterpret_cast<uintptr_t>(out.data) % size_of(out.dtype) == 0,
        "a tensor (", out, ") is not aligned to ", size_of(out.dtype),
        " bytes; pass tensor.clone()");
#ifdef DISTAYA_CUDA_SIM
  cuda_sim::admit(out);
#endif
  if (out.on_cuda) refuse_after_fork();

  PyObject* grad = PyObject_GetAttr(object, border.requires_grad);
  const bool tracked = grad == Py_True;
  Py_XDECREF(grad);
  check(!tracked, "a tensor (", out,
        ") requires grad, which kernels would bypass; pass tensor.detach()");
}

}  // namespace distaya

namespace pybind11::detail {

template <>
struct type_caster<distaya::Tensor> {
  PYBIND11_TYPE_CASTER(distaya::Tensor, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    if (!PyObject_TypeCheck(source.ptr(), distaya::Border::get().tensor_type)) return false;
    distaya::borrow(source.ptr(), value);
    return true;
  }
};

}  // namespace pybind11::detail
