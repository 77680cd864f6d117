// The only file that includes pybind11: the table of contents of `distaya_ext._C`, in pipeline
// order.
#include <pybind11/functional.h>
#include <unistd.h>

#include <optional>

#include "cholesky/cholesky.h"
#include "core/among.h"
#include "core/bind.h"
#include "core/cpu.h"
#include "core/planted.h"
#include "core/probe.h"
#include "dass/dass.h"
#include "hessian/hessian.h"
#include "influence/influence.h"
#include "mask/mask.h"
#include "obs/obs.h"
#include "pack/pack.h"
#include "refit/refit.h"
#include "sqgemm/fragments.h"
#include "sqgemm/sqgemm.h"

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

// Lets Ctrl-C end a long kernel. Signals are the main thread's business; gettid() rather than a
// stored identity, because the thread that forks is the child's main thread.
void poll_signals() {
  if (gettid() != getpid()) return;
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

void bind_core(py::module_& m) {
  cpu::set_poll(&poll_signals);
  m.attr("has_cuda") = has_cuda;
  m.attr("cuda_archs") = DISTAYA_CUDA_ARCHS;
  m.def("isa", [] { return cpu::name_of(cpu::isa()); }, "Instruction set the CPU kernels run on");
  m.def("best_isa", [] { return cpu::name_of(cpu::best_isa()); });
  m.def("set_isa", [](const std::string& name) { cpu::set_isa(cpu::parse_isa(name)); }, "name"_a);
  m.def(
      "threads", [] { return cpu::threads(); },
      "Threads of the pool shared with torch; 1 in a forked child");
  m.def("peak", &probe::peak, "Measured one-thread FMA rates in Gflop/s", release_gil());
  m.def("read", &probe::read, "t"_a, "Xor of the 64-byte lines of t, by all threads",
        release_gil());
  m.def("cuda_status", &probe::cuda_status,
        "Driver, runtime and devices as the CUDA runtime sees them");
  m.def("touch", &probe::touch, "a"_a, "b"_a, "c"_a, "d"_a,
        "Sum of sizes: measures the border's cost");
  py::class_<AmongOptions>(m, "AmongOptions", py::module_local())
      .def(py::init<int64_t, int64_t, int64_t, int64_t, std::function<void(int64_t)>>(), "rank"_a,
           "world"_a, "first"_a, "total"_a, "exchange"_a);
#ifdef DISTAYA_SANITIZE
  m.def("plant", &plant, "fault"_a, "Does something wrong on purpose", release_gil());
#endif
}

}  // namespace
}  // namespace distaya

PYBIND11_MODULE(_C, m) {
  using namespace distaya;
  m.doc() = "Kernels of distaya_ext; import through distaya_ext.ops only";
  bind_core(m);

  // --- hessian -----------------------------------------------------------------------------------
  m.def("hessian", &hessian, "H"_a, "X"_a, "weights"_a, "Upper triangle of H += sum w x x^T",
        release_gil());
  m.def("cross", &cross, "G"_a, "Y"_a, "X"_a, "weights"_a, "G += sum w y x^T", release_gil());
  m.def("column_sq", &column_sq, "s"_a, "X"_a, "weights"_a, "s += sum w x^2", release_gil());
  m.def("symmetrize", &symmetrize, "H"_a, "Copies the upper triangle of H onto the lower",
        release_gil());

  // --- cholesky ----------------------------------------------------------------------------------
  m.def("cholesky_work", &cholesky_work, "H"_a);
  m.def("cholesky_", &cholesky_, "H"_a, "damp"_a, "floor"_a, "info"_a, "mean"_a, "work"_a,
        release_gil());
  m.def("inverse_factor", &inverse_factor, "R"_a, "U"_a, release_gil());
  m.def("inverse", &inverse, "U"_a, "out"_a, release_gil());
  m.def("solve_", &solve_, "B"_a, "R"_a, "all_rows"_a = 0, release_gil());

  // --- mask --------------------------------------------------------------------------------------
  m.attr("mask_table") = mask::kTable;
  m.def("mask_keep_work", &mask::keep_work, "scores"_a, "along"_a);
  m.def("mask_score_work", &mask::score_work, "rows"_a, "cols"_a);
  m.def(
      "mask_score",
      [](const Tensor& W, const std::string& method, const MaybeTensor& norms, double power,
         const MaybeTensor& work, const Tensor& S) {
        mask_score(W, method, norms ? &*norms : nullptr, power, work ? &*work : nullptr, S);
      },
      "W"_a, "method"_a, "norms"_a, "power"_a, "work"_a, "S"_a,
      "S = importance of each weight: magnitude, wanda or ria", release_gil());
  m.def(
      "mask_keep_k",
      [](const Tensor& scores, int64_t k, const std::string& along, const Tensor& mask,
         const Tensor& bad, const MaybeTensor& work, const AmongOptions* among,
         const MaybeTensor& tables) {
        mask_keep_k(scores, k, along, mask, bad, work ? &*work : nullptr, among,
                    tables ? &*tables : nullptr);
      },
      "scores"_a, "k"_a, "along"_a, "mask"_a, "bad"_a, "work"_a, "among"_a = py::none(),
      "tables"_a = py::none(), "mask = the k best scores of each row, each column or the matrix",
      release_gil());
  m.def("mask_keep_nm", &mask_keep_nm, "scores"_a, "n"_a, "m"_a, "along"_a, "mask"_a, "bad"_a,
        "mask = the n best of every m consecutive inputs or outputs", release_gil());

  // --- dass --------------------------------------------------------------------------------------
  m.def("dass_score", &dass_score, "W"_a, "norms"_a, "power"_a, "S"_a,
        "S_ij = |W_ij| norm_i^power, norms of the outputs", release_gil());
  m.def(
      "dass_moments",
      [](const Tensor& s, const Tensor& gate, const Tensor& up, const std::string& act,
         const MaybeTensor& weights) {
        dass_moments(s, gate, up, act, weights ? &*weights : nullptr);
      },
      "s"_a, "gate"_a, "up"_a, "act"_a, "weights"_a,
      "s += sum over tokens of (act(g) u)^2, act(g)^2 and (act'(g) u)^2", release_gil());
  m.def("dass_balance", &dass_balance, "scores"_a, "n"_a, "m"_a, "rounds"_a, "order"_a,
        "Exchanges neurons between N:M groups while that lowers what is pruned", release_gil());

  // --- obs ---------------------------------------------------------------------------------------
  py::class_<GridOptions>(m, "GridOptions", py::module_local())
      .def(py::init<int64_t, int64_t, bool, bool, std::string>(), "bits"_a = 0, "group"_a = 0,
           "symmetric"_a = false, "mse"_a = false, "scale_dtype"_a = "float32");
  py::class_<ObsOptions>(m, "ObsOptions", py::module_local())
      .def(py::init<std::string, double, bool, int64_t, int64_t, GridOptions, bool>(),
           "select"_a = "none", "sparsity"_a = 0.0, "reference"_a = false, "n"_a = 0, "m"_a = 0,
           "grid"_a = GridOptions{}, "dynamic"_a = false);
  m.def("obs", &obs, "W"_a, "R"_a, "mask"_a, "codes"_a, "scales"_a, "zeros"_a, "group_of"_a,
        "loss"_a, "work"_a, "options"_a, "among"_a = py::none(), "tables"_a = py::none(),
        release_gil());
  m.attr("obs_table") = kBins;
  m.def("obs_work", &obs_work, "W"_a);
  m.def("quantize", &quantize, "W"_a, "codes"_a, "scales"_a, "zeros"_a, "options"_a, release_gil());

  // --- refit -------------------------------------------------------------------------------------
  m.def("refit", &refit, "target"_a, "mask"_a, "H"_a, "start"_a, "damp"_a, "iterations"_a, "out"_a,
        "before"_a, "after"_a, "work"_a, "all_rows"_a = 0,
        "Least squares for the kept weights, by conjugate gradients", release_gil());
  m.def("refit_work", &refit_work, "out"_a);
  m.def("admm", &admm, "G"_a, "X"_a, "mask"_a, "Y"_a, "inverse"_a, "rho"_a, "ratio"_a,
        "all_rows"_a = 0, release_gil());
  m.def("multiply", &multiply, "C"_a, "X"_a, "B"_a, "all_rows"_a = 0, "C += X B", release_gil());

  // --- influence ---------------------------------------------------------------------------------
  m.def("similarity", &similarity, "X"_a, "Y"_a, "out"_a,
        "1 - cos, angle / pi and |y - x| / |x| of each row", release_gil());
  m.def("divergence_work", &divergence_work, "Q"_a);
  m.def("divergence", &divergence, "P"_a, "Q"_a, "W"_a, "bias"_a, "targets"_a, "scale"_a, "cap"_a,
        "out"_a, "work"_a, "KL, both -log of the target and whether the first choices agree",
        release_gil());

  // --- pack --------------------------------------------------------------------------------------
  m.def(
      "pack_survey",
      [](const Tensor& codes, const MaybeTensor& zeros, const Spec& spec, const Tensor& out) {
        pack_survey(codes, zeros ? &*zeros : nullptr, spec, out);
      },
      "codes"_a, "zeros"_a, "spec"_a, "out"_a, "What each tile would take as a sparse kind",
      release_gil());
  m.def(
      "pack_write",
      [](const Tensor& codes, const Tensor& scales, const MaybeTensor& zeros,
         const MaybeTensor& offsets, const Spec& spec, const Tensor& data, const Tensor& bad) {
        pack_write(codes, scales, zeros ? &*zeros : nullptr, offsets ? &*offsets : nullptr, spec,
                   data, bad);
      },
      "codes"_a, "scales"_a, "zeros"_a, "offsets"_a, "spec"_a, "data"_a, "bad"_a, release_gil());
  m.def(
      "pack_read",
      [](const Tensor& data, const Spec& spec, const Tensor& codes, const Tensor& scales,
         const MaybeTensor& zeros) {
        pack_read(data, spec, codes, scales, zeros ? &*zeros : nullptr);
      },
      "data"_a, "spec"_a, "codes"_a, "scales"_a, "zeros"_a, release_gil());
  m.def("pack_dequantize", &pack_dequantize, "data"_a, "spec"_a, "first"_a, "W"_a, release_gil());
  m.def("pack_gather", &pack_gather, "data"_a, "spec"_a, "indices"_a, "W"_a, release_gil());

  // --- sqgemm ------------------------------------------------------------------------------------
  m.def("sqgemm_work", &sqgemm::work_bytes, "x"_a, "spec"_a, "glu"_a, "wgmma"_a);
  m.def("sqgemm_has_wgmma", &sqgemm::has_wgmma, "x"_a, "spec"_a,
        "Whether the warpgroup kernels of sm_90a serve this x");
  m.def("sqgemm_linear", &sqgemm_linear, "x"_a, "data"_a, "spec"_a, "bias"_a, "exact"_a, "wgmma"_a,
        "work"_a, "y"_a, "y = x W^T + bias for a packed W", release_gil());
  m.def(
      "sqgemm_cuda_most_tokens",
      [](const Spec& spec, const Tensor& x) {
        return sqgemm::cuda_most_tokens(pack::read_spec(spec).kind, x.dtype);
      },
      "spec"_a, "x"_a, "Tokens above which a dense product of the dequantized W is faster");
  m.def(
      "sqgemm_fragments",
      [](int64_t kind) {
        const sqgemm::Fragments f = sqgemm::fragments_of(kind);
        return py::dict("steps"_a = f.steps, "a"_a = f.a, "b"_a = f.b, "meta"_a = f.meta,
                        "rows"_a = f.rows, "pair_slabs"_a = f.pair_slabs,
                        "pair_rows"_a = f.pair_rows, "order"_a = f.order);
      },
      "kind"_a, "What each lane of a warp takes from a packed tile (sqgemm/fragments.h)");
  m.def("sqgemm_glu", &sqgemm_glu, "x"_a, "gate"_a, "up"_a, "spec"_a, "act"_a, "bias_gate"_a,
        "bias_up"_a, "exact"_a, "wgmma"_a, "work"_a, "y"_a, "y = act(x W_gate^T) * (x W_up^T)",
        release_gil());
}
