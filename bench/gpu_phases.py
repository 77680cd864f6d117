"""What the seconds of compress() go to, for bench/gpu_whole.py."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from distaya_ext.compress import aim, layers, packing, statistic, twin, walk
from distaya_ext.ops import cholesky, obs, refit

# What is timed inside a layer; what is called inside another phase counts only for itself.
PHASES = (
    (walk.LayerWalk, "_run", "forward"),
    (twin.Twin, "_run", "dense forward"),
    (statistic.Statistic, "add", "hessian"),
    (aim.Aim, "add", "cross moment"),
    (cholesky, "cholesky_", "factor"),
    (aim.Aim, "weights", "aim"),
    (obs, "obs_", "sweep"),
    (refit, "refit_", "refit"),
    (packing.Packing, "start", "pack"),
    (packing.Packing, "encode", "pack"),
)


class Phases:
    """Seconds of each phase, by CUDA events on a GPU. Use as a context manager around the run."""

    def __init__(self, cuda: bool):
        self.cuda = cuda
        self._stack = ["other"]
        self._spans: list[tuple[str, Any, Any]] = []
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Phases:
        self._last = self._mark()
        for owner, name, phase in PHASES:
            self._wrap(owner, name, phase)
        self._wrap(layers.Layers, "_layer", "other in a layer")
        return self

    def __exit__(self, *_: object) -> None:
        self._switch()
        for undo in self._undo:
            undo()

    def _wrap(self, owner: Any, name: str, phase: str) -> None:
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._stack.append(phase)
            try:
                return original(*args, **kwargs)
            finally:
                self._switch()
                self._stack.pop()

        setattr(owner, name, timed)
        self._undo.append(lambda: setattr(owner, name, original))

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _switch(self) -> None:
        """What passed since the last switch belongs to the phase on top."""
        now = self._mark()
        self._spans.append((self._stack[-1], self._last, now))
        self._last = now

    def seconds(self) -> dict[str, float]:
        """By phase, largest first; after the run."""
        if self.cuda:
            torch.cuda.synchronize()
        found: dict[str, float] = defaultdict(float)
        for phase, begin, end in self._spans:
            found[phase] += begin.elapsed_time(end) / 1e3 if self.cuda else end - begin
        return dict(sorted(found.items(), key=lambda item: -item[1]))
