"""A step's gradient out of what its micro-batches gave: over parts, over ranks, over labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..ranks import PartSums, Sum, team
from .dealing import Dealt
from .sharding import Shards, is_sharded, local


class Gradients:
    """What autograd adds up is all there is: one process, one part."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self.parameters = list(parameters.values())

    def begin(self) -> None:
        """Before a step's first micro-batch."""

    def close(self) -> None:
        """The last micro-batch of a part of this rank's was passed back."""

    def finish(self) -> None:
        """Every parameter's grad becomes the sum over all micro-batches of all ranks."""

    def average(self, count: float, clip: float) -> float:
        """Divide by the labels, clip; the norm before that, which may be no finite number."""
        held = [p for p in self.parameters if p.grad is not None]
        for parameter in held:
            parameter.grad.div_(count)
        return float(nn.utils.clip_grad_norm_(held, clip))

    def leave(self) -> None:
        """The training is over."""


class Summed(Gradients):
    """Over parts, in the order of ranks.PartSums: the grads are views into one float32 buffer.

    What no micro-batch of any rank gave a gradient has none, as in one process: AdamW then leaves
    it alone.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], dealt: Dealt):
        super().__init__(parameters)
        self.dealt = dealt
        first = self.parameters[0]
        self._flat = torch.zeros(sum(p.numel() for p in self.parameters), device=first.device)
        sizes = [p.numel() for p in self.parameters]
        pieces = self._flat.split(sizes)
        self._views = [v.view(p.shape) for v, p in zip(pieces, self.parameters, strict=True)]
        self._used = torch.zeros(len(sizes), dtype=torch.uint8)
        self._hooks: list[Any] = []
        for number, parameter in enumerate(self.parameters):
            noting = partial(self._note, number)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(noting))

    def _note(self, number: int, _: torch.Tensor) -> None:
        self._used[number] = 1

    def begin(self) -> None:
        self._flat.zero_()
        self._used.zero_()
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.grad = view
        self._sums = PartSums(self.dealt.parts, [Sum(self._flat)])

    def close(self) -> None:
        self._sums.close()

    def finish(self) -> None:
        self._sums.finish()
        used = team().all_gather(self._used).amax(dim=0)
        for parameter, any_rank in zip(self.parameters, used.tolist(), strict=True):
            if not any_rank:
                parameter.grad = None

    def leave(self) -> None:
        for hook in self._hooks:
            hook.remove()


class Scattered(Gradients):
    """Of sharded parameters: FSDP has summed over the ranks, and each has its own rows."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], shards: Shards):
        super().__init__(parameters)
        kept = shards.pruned
        self._pruned = [p for name, p in parameters.items() if name in kept]

    def finish(self) -> None:
        for parameter in self._pruned:
            if parameter.grad is not None:
                local(parameter.grad).masked_fill_(local(parameter) == 0, 0)

    def average(self, count: float, clip: float) -> float:
        held = [p.grad for p in self.parameters if p.grad is not None]
        assert all(map(is_sharded, held))
        own = torch.zeros(1, dtype=torch.float64)
        for gradient in map(local, held):
            gradient.div_(count)
            own += gradient.double().square().sum().cpu()
        norm = math.sqrt(float(team().all_gather(own).sum()))
        if norm > clip:
            for gradient in map(local, held):
                gradient.mul_(clip / (norm + 1e-6))  # as clip_grad_norm_ has it
        return norm


def gradients_of(
    parameters: Mapping[str, nn.Parameter], dealt: Dealt, shards: Shards | None
) -> Gradients:
    if shards is not None:
        return Scattered(parameters, shards)
    return Summed(parameters, dealt) if dealt.parts.count > 1 else Gradients(parameters)
