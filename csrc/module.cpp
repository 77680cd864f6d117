// The only file that includes pybind11: the table of contents of `distaya_ext._C`, in pipeline
// order.
#include <optional>

#include "core/bind.h"
#include "core/cpu.h"
#include "core/probe.h"
#include "obs/obs.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace distaya {

Stream stream_of(const Tensor& t) {
  if (!t.on_cuda) return nullptr;
  void* stream = nullptr;
  const int status = Border::get().api->current_work_stream(
      static_cast<int32_t>(dlpack::DeviceType::cuda), t.device, &stream);
  check(status == 0, "torch did not name its current stream of cuda:", t.device);
  return stream;
}

namespace {

using MaybeTensor = std::optional<Tensor>;
using release_gil =
    py::call_guard<py::gil_scoped_release>;  // kernels are long; tensors stay borrowed

void bind_core(py::module_& m) {
  m.attr("has_cuda") = has_cuda;
  m.attr("cuda_archs") = DISTAYA_CUDA_ARCHS;
  m.def("isa", [] { return cpu::name_of(cpu::isa()); }, "Instruction set the CPU kernels run on");
  m.def("best_isa", [] { return cpu::name_of(cpu::best_isa()); });
  m.def("set_isa", [](const std::string& name) { cpu::set_isa(cpu::parse_isa(name)); }, "name"_a);
  m.def("threads", [] { return omp_get_max_threads(); }, "Threads of the pool shared with torch");
  m.def("peak", &probe::peak, "Measured one-thread FMA rates in Gflop/s", release_gil());
  m.def("cuda_status", &probe::cuda_status,
        "Driver, runtime and devices as the CUDA runtime sees them");
  m.def("touch", &probe::touch, "a"_a, "b"_a, "c"_a, "d"_a,
        "Sum of sizes: measures the border's cost");
}

}  // namespace
}  // namespace distaya

PYBIND11_MODULE(_C, m) {
  using namespace distaya;
  m.doc() = "Kernels of distaya_ext; import through distaya_ext.ops only";
  bind_core(m);

  // --- hessian -----------------------------------------------------------------------------------

  // --- cholesky ----------------------------------------------------------------------------------

  // --- mask --------------------------------------------------------------------------------------

  // --- obs ---------------------------------------------------------------------------------------
  py::class_<GridOptions>(m, "GridOptions")
      .def(py::init<int64_t, int64_t, bool, bool, std::string>(), "bits"_a = 0, "group"_a = 0,
           "symmetric"_a = false, "mse"_a = false, "scale_dtype"_a = "float32");
  py::class_<ObsOptions>(m, "ObsOptions")
      .def(py::init<std::string, double, bool, int64_t, int64_t, GridOptions, bool>(),
           "select"_a = "none", "sparsity"_a = 0.0, "reference"_a = false, "n"_a = 0, "m"_a = 0,
           "grid"_a = GridOptions{}, "dynamic"_a = false);
  m.def("obs", &obs, "W"_a, "R"_a, "mask"_a, "codes"_a, "scales"_a, "zeros"_a, "group_of"_a,
        "loss"_a, "work"_a, "options"_a, release_gil());
  m.def("obs_work", &obs_work, "rows"_a, "cols"_a, "on_cuda"_a);
  m.def("quantize", &quantize, "W"_a, "codes"_a, "scales"_a, "zeros"_a, "options"_a, release_gil());
}
