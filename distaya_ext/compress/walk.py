"""The one-forward, truly sequential walk through one decoder layer.

Every Linear runs exactly once per calibration token, already compressed, and its successors see it.
The layer's forward is run in passes. A pass for stage s ends, for every chunk of windows, at the
first Linear of s, whose input goes to the statistic of s. What ran in an earlier pass is not run
again. A Linear whose output is that of its block (o_proj of attention, down_proj of an MLP) has its
input kept when it is gathered; the next pass runs that Linear alone and the block's output is kept
instead. Outputs of other Linears are kept only where that does not help. Norms are recomputed,
which yields the same bits. One chunk is alive at a time; the rest is in the Store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..models import Architecture, Stage
from .capture import Call
from .ferry import Checks
from .store import Store


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
        checks: Checks,
    ):
        self.layer = layer
        self.calls = calls
        self.hidden = hidden
        self.tape = tape
        self.checks = checks
        self.runs: dict[str, int] = {}  # Linear -> number of chunks it ran on
        self._stage_of = {name: stage for stage in architecture.stages for name in stage.names}
        self._open: set[str] = set()  # Linears that hold their final weights
        self._gathering: Stage | None = None
        self._reached: torch.Tensor | None = None  # the input of the stage being gathered
        self._chunk = 0
        self._last = self._aside = False
        self._seen: dict[Stage, torch.Tensor] = {}  # inputs of chunk 0: proof that a stage shares
        self._inside = {
            block: [name for name in self._stage_of if name.startswith(block + ".")]
            for block in architecture.blocks
        }
        self._block_of = {name: block for block, names in self._inside.items() for name in names}
        # A stage of one Linear that is the last of its block -> that block.
        self._ends = {
            self._stage_of[names[-1]]: block
            for block, names in self._inside.items()
            if len(self._stage_of[names[-1]].names) == 1
        }
        self._size: dict[str, int] = {}  # block -> length of the tuple it returns, 0: a tensor
        self._latest: torch.Tensor | None = None  # what a Linear gave last
        for name in self._stage_of:
            self._wrap(name, self._linear)
        for name in self._inside:
            self._wrap(name, self._block)

    def gather(self, stage: Stage) -> Iterator[tuple[int, torch.Tensor]]:
        """Run chunk after chunk up to the stage: (chunk, its input [windows, length, columns])."""
        self._gathering = stage
        for chunk in range(len(self.calls)):
            try:
                self._run(chunk)
            except _Boundary:
                x, self._reached = self._reached, None
                yield chunk, x
                continue
            raise InputError(
                f"the layer never called {stage.names[0]}; its architecture table is wrong"
            )
        self._gathering = None

    def release(self, stage: Stage) -> None:
        """The stage's Linears hold their final weights and may run."""
        self._open.update(stage.names)

    def finish(self) -> None:
        """Run what is left of the layer and put its outputs in the place of its inputs."""
        self._last = True
        for chunk in range(len(self.calls)):
            self.hidden.put(("hidden", chunk), self._run(chunk))
            self._forget(chunk)
        for name in [*self._stage_of, *self._inside]:
            del self.layer.get_submodule(name).forward  # a cycle would outlive the layer

    def block_ended_by(self, stage: Stage) -> str | None:
        """The block whose output is that of the stage's one Linear."""
        return self._ends.get(stage)

    def input(self, chunk: int) -> torch.Tensor:
        """The layer's input of a chunk."""
        return self.hidden.get(("hidden", chunk))

    def output(self, block: str, chunk: int) -> torch.Tensor:
        """A block's output of a chunk, once it has run in full and until finish()."""
        out = self.tape.get((block, chunk))
        return out[0] if isinstance(out, tuple) else out

    def step_aside(self) -> None:
        """From now on the layer runs as it is: weights may change, nothing kept is used."""
        self._aside = True
        for chunk in range(len(self.calls)):
            self._forget(chunk)

    def blanked(self) -> None:
        """What is kept of some windows was made zero: inputs seen before are no proof any more."""
        self._seen.clear()

    def _forget(self, chunk: int) -> None:
        for name in [*self._stage_of, *self._inside]:
            self.tape.drop((name, chunk))
            self.tape.drop(("input", name, chunk))

    def _run(self, chunk: int) -> torch.Tensor:
        self._chunk = chunk
        with torch.no_grad():
            return self.calls[chunk].run(self.layer, self.hidden.get(("hidden", chunk)))

    def _wrap(self, name: str, around: Callable[..., Any]) -> None:
        module = self.layer.get_submodule(name)
        forward = module.forward

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._aside:
                return forward(*args, **kwargs)
            return around(name, forward, args, kwargs)

        module.forward = wrapped

    def _linear(self, name: str, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        stage, key = self._stage_of[name], (name, self._chunk)
        if stage is self._gathering:
            if self._chunk == 0 and len(stage.names) > 1:
                self._seen[stage] = args[0]
            self._reached = args[0]
            if stage in self._ends:
                self.tape.put(("input", self._ends[stage], self._chunk), args[0])
            raise _Boundary
        if key in self.tape:
            return self.tape.get(key)
        if name not in self._open:
            raise InputError(
                f"{name} runs before its stage; the architecture table has the wrong order"
            )
        if self._chunk == 0 and stage in self._seen:
            self._check_shared(name, stage, args[0])
        out = self._latest = forward(*args, **kwargs)
        self.runs[name] = self.runs.get(name, 0) + 1
        if self._needed_again(name):
            self.tape.put(key, out)
        return out

    def _check_shared(self, name: str, stage: Stage, x: torch.Tensor) -> None:
        """All Linears of a stage must read what was gathered at its first."""

        def judge(same: torch.Tensor) -> None:
            if not bool(same):
                raise InputError(
                    f"{name} does not read the input of {stage.names[0]}; the table is wrong"
                )

        seen = self._seen[stage]
        fits = seen.shape == x.shape
        self.checks.expect(judge, (seen == x).all() if fits else torch.tensor(False))

    def _needed_again(self, name: str) -> bool:
        """Whether a later pass will ask for this Linear's output, not for its block's."""
        block = self._block_of.get(name)
        if self._last or (block is not None and self._complete(block)):
            return False
        # The first chunk runs its blocks in full once more: see _learn.
        return self._chunk == 0 or block is None or self._ends.get(self._gathering) != block

    def _complete(self, block: str) -> bool:
        return all(linear in self._open for linear in self._inside[block])

    def _block(self, name: str, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        key, held = (name, self._chunk), ("input", name, self._chunk)
        if key in self.tape:
            return self.tape.get(key)
        if held in self.tape and self._chunk > 0:
            last = self.layer.get_submodule(self._inside[name][-1])
            y = last(self.tape.get(held))
            out = (y, *[None] * (self._size[name] - 1)) if self._size[name] else y
        else:
            out = forward(*args, **kwargs)
            if held in self.tape:
                self._learn(name, out)
        self._latest = None
        self.tape.drop(held)
        if not self._last and self._complete(name):
            self.tape.put(key, out)
            for linear in self._inside[name]:
                self.tape.drop((linear, self._chunk))
        return out

    def _learn(self, name: str, out: Any) -> None:
        """How the block wraps its last Linear's output, seen on the first chunk. What else it
        returns (attention weights, of some families) no decoder layer uses.
        """
        if (out[0] if isinstance(out, tuple) else out) is not self._latest:
            raise InputError(
                f"{name} gives something else than the output of {self._inside[name][-1]}; the "
                "architecture table is wrong"
            )
        self._size[name] = len(out) if isinstance(out, tuple) else 0
