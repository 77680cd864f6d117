"""Float32 masters of parameters that learn, rounded to the model's dtype where they are used."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_ORIGINAL = ".original"


class Rounded(nn.Module):
    """A float32 master as the dtype of the model; its gradient passes as it is."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        return master.to(self.dtype)


def master(
    module: nn.Module, which: str, shared: nn.Parameter | None = None, keep: bool = False
) -> nn.Parameter:
    """Make the parameter of a module learn, in float32; returns what learns.

    shared  the master of a tied parameter, which this one is to have too
    keep    zeros get no gradient, so that any optimiser leaves them 0
    """
    before = getattr(module, which)
    dtype = before.dtype
    if dtype != torch.float32:
        parametrize.register_parametrization(module, which, Rounded(dtype), unsafe=True)
        held = module.parametrizations[which]
        held.original = found = nn.Parameter(before.detach().float()) if shared is None else shared
    else:
        found = before
    if shared is None:
        found.requires_grad_(True)
        found.pruned = keep  # sharded parameters are others, without the hook
        if keep:
            found.register_hook(lambda gradient: gradient.masked_fill(found == 0, 0))
    return found


def plain_name(name: str) -> str:
    """The name in a folder of a parameter that PEFT or a master has renamed."""
    name = name.replace(".base_layer.", ".")
    return name.replace("parametrizations.", "").removesuffix(_ORIGINAL)
