"""How a kernel becomes ``torch.ops.distaya.<name>``: define + impl + fake.

Not ``torch.library.custom_op``, which costs about five times more per call.
"""

from collections.abc import Callable
from typing import Any

import torch

# A module global: the registration lives as long as this object.
LIB = torch.library.Library("distaya", "DEF")


def op(fake: Callable[..., Any] | None = None, mutates: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Register a function as ``torch.ops.distaya.<its name>`` for CPU and CUDA tensors.

    fake: shape function for tracing (same arguments; returns meta results). None = returns nothing.
    mutates: names of the arguments written in place.

    The op has no gradient of its own and does not pretend to: a tensor that requires grad is
    refused at the border, so use ``.detach()`` or wrap the call in a ``torch.autograd.Function``.
    """

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        LIB.define(fn.__name__ + torch.library.infer_schema(fn, mutates_args=mutates))
        for device in ("CPU", "CUDA"):
            LIB.impl(fn.__name__, fn, device)
        LIB.impl(fn.__name__, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"distaya::{fn.__name__}", fake or _nothing, lib=LIB)
        return getattr(torch.ops.distaya, fn.__name__).default

    return register


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None
