"""The dense model beside the compressed one: what a Linear should give, given what it now sees.

Compressing a layer for the inputs that the layers before it now give, but towards its dense
weights, keeps every error made before. So the calibration tokens are carried twice, through the
layers as they are written and, in lock step, through the layers as they were. A stage that ends a
block (o_proj, down_proj) then aims at the dense model's residual stream,

    Y = y_d + (h_d - h) + sum over the blocks of this layer that have run (b_d - b)

where h is the layer's input, b a block's output, y = W x the Linear's own output without its bias
and _d the dense model; any other stage aims at its own dense output, W x_d. The closed form is in
aim.py.

Sources: asymmetric calibration, GPTAQ (Li et al. 2025, section 3); with the residual stream as the
target it is stage-wise distillation by least squares.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from ..models import Architecture, Stage
from .capture import Call
from .store import Store
from .walk import LayerWalk


class Twin:
    """One decoder layer as it was, run beside the walk over the layer being compressed.

    layer holds the dense weights, walk is over the other copy of it; hidden keeps the dense stream
    as walk's keeps the compressed one. Every chunk runs through the whole dense layer once, when
    its first stage is gathered; what later stages aim at waits on the tape.
    """

    def __init__(
        self,
        layer: nn.Module,
        walk: LayerWalk,
        architecture: Architecture,
        calls: list[Call],
        hidden: Store,
        tape: Store,
    ):
        self.layer, self.walk, self.calls = layer, walk, calls
        self.hidden, self.tape, self.adds = hidden, tape, architecture.adds
        self._stages = architecture.stages
        self._ran: set[int] = set()  # chunks

    def ends(self, stage: Stage) -> bool:
        """Whether pairs() gives the outputs wanted of the stage, not its dense inputs."""
        return self.walk.block_ended_by(stage) is not None

    def pairs(self, stage: Stage) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(chunk, x, y), each [windows, length, ...]: the stage's input now and what to aim at."""
        for chunk, x in self.walk.gather(stage):
            self._run(chunk)
            kept = self.tape.get((stage.names[0], chunk))
            yield chunk, x, self._wanted(stage, chunk, kept) if self.ends(stage) else kept

    def release(self, stage: Stage) -> None:
        """The stage is done: of what it aimed at only block outputs are needed further."""
        if not self.ends(stage):
            for chunk in self._ran:
                self.tape.drop((stage.names[0], chunk))

    def finish(self) -> None:
        """hidden then holds the dense layer's outputs."""
        for chunk in range(len(self.calls)):
            self._run(chunk)
            self.hidden.put(("hidden", chunk), self.tape.get(("out", chunk)))
            self.tape.drop(("out", chunk))
            for stage in self._stages:
                self.tape.drop((stage.names[0], chunk))

    def _run(self, chunk: int) -> None:
        """Run a chunk through the dense layer, unless it did, and keep what stages aim at."""
        if chunk in self._ran:
            return
        self._ran.add(chunk)
        hooks = []
        for stage in self._stages:
            linear = self.layer.get_submodule(stage.names[0])
            keep = partial(self._keep, (stage.names[0], chunk), self.ends(stage))
            hooks.append(linear.register_forward_hook(keep))
        with torch.no_grad():
            out = self.calls[chunk].run(self.layer, self.hidden.get(("hidden", chunk)))
        self.tape.put(("out", chunk), out)
        for hook in hooks:
            hook.remove()

    def _keep(
        self, key: Any, output: bool, _: nn.Module, given: tuple[Any, ...], out: torch.Tensor
    ) -> None:
        self.tape.put(key, out if output else given[0])

    def _wanted(self, stage: Stage, chunk: int, own: torch.Tensor) -> torch.Tensor:
        bias = self.layer.get_submodule(stage.names[0]).bias
        wanted = own.float() if bias is None else own.float() - bias.float()
        if self.adds:
            wanted = wanted + self.hidden.get(("hidden", chunk)).float()
            wanted -= self.walk.input(chunk)
            for before in self._stages[: self._stages.index(stage)]:
                block = self.walk.block_ended_by(before)
                if block is not None:
                    wanted += self.tape.get((before.names[0], chunk))
                    wanted -= self.walk.output(block, chunk)
        return wanted.to(own.dtype)
