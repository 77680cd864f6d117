"""What the compiled module knows about this machine: ISA, threads, CUDA, measured peaks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch  # before _C: its OpenMP runtime must be the one we share

from distaya_ext import _C

# A pool of threads does not survive fork(): a child that asked it for work would wait forever. Our
# kernels see to themselves (core/cpu.h); torch and MKL, which our ops use, must be told.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

ISAS = ("portable", "avx2", "avx512")


def isa() -> str:
    """Instruction set the CPU kernels run on now: ``portable``, ``avx2`` or ``avx512``."""
    return _C.isa()


def best_isa() -> str:
    """Best instruction set this CPU offers among those the module was compiled for."""
    return _C.best_isa()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels on a lesser instruction set inside the block (tests, comparisons).

    Raises ValueError for an unknown name or a set this CPU lacks. Process-wide, not per thread.
    """
    before = _C.isa()
    _C.set_isa(name)
    try:
        yield
    finally:
        _C.set_isa(before)


def threads() -> int:
    """Threads of the OpenMP pool the kernels use; it is torch's (``torch.set_num_threads``).

    1 in a forked child, whatever torch is set to: the pool stayed with the parent.
    """
    return _C.threads()


def has_cuda() -> bool:
    """True when this build carries CUDA kernels (says nothing about a GPU being present)."""
    return _C.has_cuda


def cuda_archs() -> list[str]:
    """CUDA architectures compiled into this build, e.g. ``["80-real", "90a-real"]``; [] without."""
    return _C.cuda_archs.split()


def cuda_status() -> dict[str, str]:
    """Driver, runtime and devices as the module's own CUDA runtime sees them; never raises."""
    return _C.cuda_status()


def peak() -> dict[str, float]:
    """Measured one-thread ceilings on registers alone: ``fp32``, ``bf16_dot`` (Gflop/s) and
    ``int8_dot`` (Gop/s).

    The last two are 0 where the instruction set has no such dot product. Takes about 0.1 s.
    """
    return _C.peak()


def read(t: torch.Tensor) -> int:
    """Read t (uint8 on the CPU, contiguous) once with all threads: the ceiling of memory.

    Returns the xor of its 64-byte lines as 64-bit words, so that nothing can be left out.
    """
    return _C.read(t)


# touch(a, b, c, d) -> total elements of four tensors: the cost of crossing the border at all. Not
# wrapped, because a Python frame would be a fifth of what it measures.
touch = _C.touch
