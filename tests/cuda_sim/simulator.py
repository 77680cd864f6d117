"""The simulator as tests use it: every op on ordinary CPU tensors, by the CUDA kernels."""

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_sim import build

SCHEDULES = ("forward", "reverse", "random", "greedy", "greedy-reverse")


def load(path: Path) -> ModuleType:
    """Import the module beside distaya_ext._C. pybind11 keeps modules by name: each has its own."""
    spec = importlib.util.spec_from_file_location(f"cuda_sim_{path.parent.name}._C", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bits(t: torch.Tensor) -> bytes:
    """The bytes of a tensor: NaN equals itself, and 0 is not -0."""
    return t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


LIBRARIES: list[ctypes.CDLL] = []  # all that were opened


def open_library(path: Path) -> ctypes.CDLL:
    LIBRARIES.append(ctypes.CDLL(str(path)))
    return LIBRARIES[-1]


def names(library: ctypes.CDLL, symbol: str) -> set[str]:
    """What a function of the engine lists."""
    function = library[symbol]
    function.restype = ctypes.c_char_p
    return set(function().decode().splitlines())


class Simulator:
    """A built module of simulated kernels."""

    SCHEDULES = SCHEDULES

    def __init__(self, path: Path):
        self.module = load(path)
        self._library = open_library(path)
        self._set = self._library.cuda_sim_schedule
        self._set(0)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Inside, every room's op runs its CUDA kernels in the simulator, on CPU tensors.

        The device is idle at the beginning; inside, a kernel launched early runs beside the last.
        """
        self._library.cuda_sim_settle()
        loaded = vars(sys.modules["distaya_ext.ops"]).values()
        rooms = [m for m in loaded if isinstance(m, ModuleType) and hasattr(m, "_C")]
        before = [(room, room._C) for room in rooms]
        for room in rooms:
            room._C = self.module
        try:
            yield
        finally:
            for room, compiled in before:
                room._C = compiled

    @contextmanager
    def schedule(self, name: str) -> Iterator[None]:
        """Inside, threads and blocks take turns as `name` says (README.md); else forward."""
        self._set(SCHEDULES.index(name))
        try:
            yield
        finally:
            self._set(0)

    def functions(self) -> set[str]:
        """Names of all functions of the module, as complaints call kernels."""
        return names(self._library, "cuda_sim_functions")

    @staticmethod
    def launched() -> set[str]:
        """Names of the kernels that were launched so far, by modules of patched sources too."""
        return set().union(*(names(library, "cuda_sim_launched") for library in LIBRARIES))

    def same_always(self, op: Callable[[], Any]) -> Any:
        """op()'s result in the simulator, which must have the same bits under every schedule.

        op returns a tensor or a tuple or list of tensors and None. It must not change its inputs.
        """
        first = None
        for name in SCHEDULES:
            with self.use(), self.schedule(name):
                result = op()
            parts = result if isinstance(result, tuple | list) else [result]
            found = [None if t is None else bits(t) for t in parts]
            if first is None:
                first, kept = found, result
            assert found == first, f"the schedule '{name}' gives other bits than 'forward'"
        return kept


def obtain() -> Simulator:
    """The built simulator; without a compiler the test fails, unless it may be left out."""
    if os.environ.get("DISTAYA_SKIP_CUDA_SIM") == "1":
        pytest.skip("DISTAYA_SKIP_CUDA_SIM=1: the CUDA kernels are not run in the simulator")
    try:
        return Simulator(build.build())
    except build.BuildError as error:
        pytest.fail(str(error), pytrace=False)


def altered(path: str, plain: str, other: str) -> Simulator:
    """A simulator of the kernels with one place of a source file, which must be there once, written
    otherwise.
    """
    text = (build.ROOT / path).read_text()
    assert text.count(plain) == 1
    return Simulator(build.build({path: text.replace(plain, other)}))


def early_tiles() -> Simulator:
    """Products take the large tile from 31 rows on, so that small matrices see both."""
    rows = "(g.m_all ? g.m_all : g.m)"
    plain = "large_tiles(g.m_all ? g.m_all : g.m, g.n, g.upper_only)"
    return altered("csrc/core/gemm_cuda.cu", plain, f"{rows} > 30")
