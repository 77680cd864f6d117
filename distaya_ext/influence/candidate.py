"""What of a model may be left out: a layer, its attention, its MLP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

PARTS = {"attention": "self_attn", "MLP": "mlp"}  # of a layer, and their names in it


class Candidate(NamedTuple):
    """What may be left out: kind layer, attention or MLP of layer `layer` of the source model."""

    kind: str
    layer: int

    def __str__(self) -> str:
        return f"{self.kind} {self.layer}"


@contextmanager
def silent(layer: nn.Module, name: str) -> Iterator[None]:
    """Inside, a block of the layer adds nothing: its output is zero.

    The norms some families put behind a block leave zero as it is, so this is the layer without the
    block, whether the other one reads the same input (parallel) or comes after it.
    """

    def nothing(_module: nn.Module, _args: tuple, out: Any) -> Any:
        if isinstance(out, tuple):
            return (torch.zeros_like(out[0]), *out[1:])
        return torch.zeros_like(out)

    hook = layer.get_submodule(name).register_forward_hook(nothing)
    try:
        yield
    finally:
        hook.remove()
