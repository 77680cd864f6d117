"""The simulator as tests use it: every op on ordinary CPU tensors, by the CUDA kernels."""

import ctypes
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

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


class Simulator:
    """A built module of simulated kernels."""

    SCHEDULES = SCHEDULES

    def __init__(self, path: Path):
        self.module = load(path)
        self._set = ctypes.CDLL(str(path)).cuda_sim_schedule
        self._set(0)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Inside, every room's op runs its CUDA kernels in the simulator, on CPU tensors."""
        rooms = [
            module
            for name, module in sys.modules.items()
            if name.startswith("distaya_ext.ops.") and hasattr(module, "_C")
        ]
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
