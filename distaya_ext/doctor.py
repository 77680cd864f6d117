"""What this installation will run on this machine, as plain data (``distaya doctor`` prints it)."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import distaya_ext
from distaya_ext.ops import machine, sqgemm
from distaya_ext.runtime.paths import lesser_isa

# What a room's CPU kernel multiplies with, by instruction set.
_CPU_KERNELS = {
    "avx512": {
        "hessian (bf16)": "AVX512-BF16 dot products, fp32 promotion",
        "hessian (fp16, fp32)": "AVX-512 FMA",
        "cholesky, obs": "AVX-512 FMA, 8x48 register tile",
        "mask": "AVX-512 scores, radix select",
        "pack": "AVX-512 dequantize",
        "sqgemm (int8 activations)": "AVX512-VNNI dot products, patterns expanded by VBMI2",
        "sqgemm (exact)": "AVX512-BF16 dot products for bf16, AVX-512 FMA for fp16 and fp32",
    },
    "avx2": {
        "hessian (bf16, fp16, fp32)": "AVX2 FMA (bf16 widened to fp32: no bf16 dot instruction)",
        "cholesky, obs": "AVX2 FMA, 4x24 register tile",
        "mask": "AVX2 scores, radix select",
        "pack": "AVX2 dequantize",
        "sqgemm (int8 activations)": "AVX2 multiply-add of bytes, patterns expanded by pdep",
        "sqgemm (exact)": "AVX2 FMA",
    },
    "portable": {
        "all rooms": "portable 4-lane vectors: correct, several times slower than AVX2",
    },
}

_CUDA_KERNELS = {
    "hessian (bf16, fp16)": "tensor cores, mma, fp32 promotion",
    "hessian (fp32)": "FMA",
    "cholesky, obs": "tensor cores, an fp32 product as three of tf32",
    "mask": "scores, radix select",
    "pack": "reads and writes tiles",
    "sqgemm (int4, int8, int3, masks)": "tensor cores, mma on packed weights",
    "sqgemm (2:4)": "sparse tensor cores, mma.sp with ordered metadata",
}


def report() -> dict[str, dict[str, str]]:
    """Sections of name -> value: versions, cpu, gpu, kernels, slow paths.

    Where the kernels find a GPU of compute capability 9.0, a small product runs on it.
    """
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "gpu": _gpu(),
        "kernels": _kernels(),
        "slow paths": _slow(),
    }


def _versions() -> dict[str, str]:
    out = {"distaya_ext": distaya_ext.__version__, "python": sys.version.split()[0]}
    for name in ("torch", "transformers", "safetensors", "tokenizers", "numpy"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out


def _cpu() -> dict[str, str]:
    peak = machine.peak()
    bf16 = f"{peak['bf16_dot']:.0f} Gflop/s" if peak["bf16_dot"] else "no such instruction"
    return {
        "model": _cpu_model(),
        "instruction set": f"{machine.isa()} (best here: {machine.best_isa()})",
        "threads": f"{machine.threads()} (torch: {torch.get_num_threads()})",
        "OpenMP runtimes": ", ".join(_openmp_runtimes()) or "unknown",
        "fp32 peak, 1 thread": f"{peak['fp32']:.0f} Gflop/s measured",
        "bf16 dot peak, 1 thread": bf16,
    }


def _gpu() -> dict[str, str]:
    status = machine.cuda_status()
    out = {"status": status.pop("status")}
    if machine.has_cuda():
        out["compiled for"] = " ".join(machine.cuda_archs())
    out["torch's CUDA"] = torch.version.cuda or "none (CPU build of torch)"
    return out | {key: value for key, value in status.items() if value != "0"}


def _kernels() -> dict[str, str]:
    out = {f"{room} on cpu": how for room, how in _CPU_KERNELS[machine.isa()].items()}
    usable = machine.has_cuda() and machine.cuda_status()["status"] == "ok"
    for room, how in _CUDA_KERNELS.items():
        out[f"{room} on cuda"] = how if usable else "unavailable: " + _gpu()["status"]
    if usable and torch.cuda.is_available():
        out |= _warpgroups()
    return out


def _slow() -> dict[str, str]:
    """What would run slower than it could, for any model; of a loaded one runtime.slow_paths."""
    lesser = lesser_isa()
    return {"on cpu": "none" if lesser is None else f"every packed product: {lesser}"}


def _warpgroups() -> dict[str, str]:
    """What sqgemm's check of its warpgroup products says of each device."""
    out = {}
    for i in range(torch.cuda.device_count()):
        name = f"sqgemm (int4 and 2:4, 64 tokens or more) on cuda:{i}"
        try:
            check = sqgemm.wgmma_check(torch.device("cuda", i))
        except RuntimeError as error:  # the rest of the report is needed then more than ever
            out[name] = f"failed: {error}"
            continue
        use = "wgmma, checked here" if check.ok else "mma or torch's dense products, not wgmma"
        out[name] = f"{use}: {check.report}"
    return out


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _openmp_runtimes() -> list[str]:
    """File names of the OpenMP runtimes mapped into the process; more than one means two pools."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    names = {Path(line.split()[-1]).name for line in lines if ".so" in line}
    return sorted(name for name in names if "gomp" in name or "iomp" in name or "libomp" in name)
