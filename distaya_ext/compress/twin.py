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

import torch
from torch import nn

from ..models import Architecture, Stage
from .capture import Call
from .ferry import Checks
from .store import Store
from .walk import LayerWalk


class Twin:
    """One decoder layer's dense walk, in step with the walk over the layer being compressed.

    layer holds the dense weights, walk is over the other copy of it; hidden keeps the dense stream
    as walk's keeps the compressed one.
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
        self.layer, self.walk, self.adds = layer, walk, architecture.adds
        checks = Checks(late=False)
        self.dense = LayerWalk(layer, architecture, calls, hidden, tape, checks, provided=True)

    def ends(self, stage: Stage) -> bool:
        """Whether pairs() gives the outputs wanted of the stage, not its dense inputs."""
        return self.walk.block_ended_by(stage) is not None

    def pairs(self, stage: Stage) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(chunk, x, y), each [windows, length, ...]: the stage's input now and what to aim at."""
        for (chunk, x), (_, dense) in zip(
            self.walk.gather(stage), self.dense.gather(stage), strict=True
        ):
            yield chunk, x, self._wanted(stage, chunk, dense) if self.ends(stage) else dense

    def release(self, stage: Stage) -> None:
        """The stage is done; its dense Linears run in the next pass."""
        self.dense.release(stage)

    def finish(self) -> None:
        """Run what is left of the dense layer; hidden then holds its outputs."""
        self.dense.finish()

    def _wanted(self, stage: Stage, chunk: int, x: torch.Tensor) -> torch.Tensor:
        (name,) = stage.names
        linear = self.layer.get_submodule(name)
        with torch.no_grad():
            own = torch.nn.functional.linear(x, linear.weight, linear.bias)
            self.dense.provide(name, chunk, own)
            product = own.float() if linear.bias is None else own.float() - linear.bias.float()
            if not self.adds:
                return product.to(x.dtype)
            wanted = product + self.dense.input(chunk).float() - self.walk.input(chunk).float()
            for block in self.walk.finished_blocks():
                wanted += self.dense.output(block, chunk).float()
                wanted -= self.walk.output(block, chunk).float()
            return wanted.to(x.dtype)
