"""The one-forward, truly sequential walk through one decoder layer.

Every Linear runs exactly once per calibration token, already compressed, and its successors see it.
The layer's forward is run in passes. A pass for stage s ends, for every chunk of windows, at the
first Linear of s, whose input goes to the statistic of s. Linears that ran in an earlier pass are
not run again: their outputs were kept and are handed back, and once all Linears of a block
(attention, MLP) have run, the block's output is kept instead. Only norms, rotary embeddings,
activation functions and one more attention are recomputed, which yields the same bits. One chunk is
alive at a time; the rest is in the Store.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..models import Architecture, Stage
from .capture import Call
from .store import Store

Sink = Callable[[int, torch.Tensor], None]


class _Boundary(Exception):
    """Raised inside a layer's forward when it reaches the stage being gathered."""


class LayerWalk:
    """Passes over one living decoder layer.

    hidden holds the layer's input of chunk i under key ("hidden", i); finish() replaces it by the
    output.
    """

    def __init__(
        self,
        layer: nn.Module,
        architecture: Architecture,
        calls: list[Call],
        hidden: Store,
        tape: Store,
    ):
        self.layer = layer
        self.calls = calls
        self.hidden = hidden
        self.tape = tape
        self.runs: dict[str, int] = {}  # Linear -> number of chunks it ran on
        self._stage_of = {name: stage for stage in architecture.stages for name in stage.names}
        self._open: set[str] = set()  # Linears that hold their final weights
        self._gathering: Stage | None = None
        self._sink: Sink | None = None
        self._chunk = 0
        self._last = False
        self._seen: dict[Stage, torch.Tensor] = {}  # inputs of chunk 0: proof that a stage shares
        self._blocks = architecture.blocks
        for name in self._stage_of:
            self._wrap(name, self._linear)
        for name in self._blocks:
            self._wrap(name, self._block)

    def gather(self, stage: Stage, sink: Sink) -> None:
        """Run all chunks up to the stage and give its input [windows, length, columns] to
        sink(chunk, x).
        """
        self._gathering, self._sink = stage, sink
        for chunk in range(len(self.calls)):
            try:
                self._run(chunk)
            except _Boundary:
                continue
            raise InputError(
                f"the layer never called {stage.names[0]}; its architecture table is wrong"
            )
        self._gathering = self._sink = None

    def release(self, stage: Stage) -> None:
        """The stage's Linears hold their final weights and may run."""
        self._open.update(stage.names)

    def finish(self) -> None:
        """Run what is left of the layer and put its outputs in the place of its inputs."""
        self._last = True
        for chunk in range(len(self.calls)):
            self.hidden.put(("hidden", chunk), self._run(chunk))
            for name in [*self._stage_of, *self._blocks]:
                self.tape.drop((name, chunk))
        for name in [*self._stage_of, *self._blocks]:
            del self.layer.get_submodule(name).forward  # a cycle would outlive the layer

    def _run(self, chunk: int) -> torch.Tensor:
        self._chunk = chunk
        with torch.no_grad():
            return self.calls[chunk].run(self.layer, self.hidden.get(("hidden", chunk)))

    def _wrap(self, name: str, around: Callable[..., Any]) -> None:
        module = self.layer.get_submodule(name)
        forward = module.forward

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return around(name, forward, args, kwargs)

        module.forward = wrapped

    def _linear(self, name: str, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        stage, key = self._stage_of[name], (name, self._chunk)
        if stage is self._gathering:
            if self._chunk == 0:
                self._seen[stage] = args[0]
            self._sink(self._chunk, args[0])
            raise _Boundary
        if key in self.tape:
            return self.tape.get(key)
        if name not in self._open:
            raise InputError(
                f"{name} runs before its stage; the architecture table has the wrong order"
            )
        if self._chunk == 0 and stage in self._seen and not torch.equal(self._seen[stage], args[0]):
            raise InputError(
                f"{name} does not read the input of {stage.names[0]}; the table is wrong"
            )
        out = forward(*args, **kwargs)
        self.runs[name] = self.runs.get(name, 0) + 1
        if not self._last:
            self.tape.put(key, out)
        return out

    def _block(self, name: str, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        key = (name, self._chunk)
        if key in self.tape:
            return self.tape.get(key)
        out = forward(*args, **kwargs)
        inside = [linear for linear in self._stage_of if linear.startswith(name + ".")]
        if not self._last and all(linear in self._open for linear in inside):
            self.tape.put(key, out)
            for linear in inside:
                self.tape.drop((linear, self._chunk))
        return out
