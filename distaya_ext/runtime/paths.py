"""Which packed modules of a model run slower than they could here, and why."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..ops import machine, sqgemm
from .glu import PackedGLU
from .modules import PackedHead, PackedLinear

_WGMMA_KINDS = ("int4", "int4-2:4")


class SlowKernelWarning(RuntimeWarning):
    """Some packed modules of a model run slower than they could; the results are the same."""


@dataclass(frozen=True)
class SlowPath:
    """A module by name, and what it runs on instead."""

    module: str
    what: str


def slow_paths(model: nn.Module) -> list[SlowPath]:
    """Of a loaded model, where it is now: packed products on a lesser instruction set than the
    processor has, on a GPU whose warpgroup products failed their check, and gated MLPs whose gate
    and up cannot run as one kernel (different formats, LoRA beside them, hooks). Dense modules are
    torch's own and never listed.
    """
    found: list[SlowPath] = []
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | PackedHead):
            found += [SlowPath(name, what) for what in _products(module)]
        elif _splits(module):
            found.append(SlowPath(name, "gate and up one by one instead of in one kernel"))
    return found


def sentence(found: list[SlowPath]) -> str:
    """All of them: how many of each, and the first."""
    kinds = Counter(each.what for each in found)
    first = {what: next(e.module for e in found if e.what == what) for what in kinds}
    told = (f"{n} on {what} (first {first[what]})" for what, n in kinds.items())
    return f"{len(found)} modules run slower than they could: {'; '.join(told)}"


def tell(model: nn.Module) -> None:
    """A SlowKernelWarning where there are any."""
    if found := slow_paths(model):
        warnings.warn(sentence(found), SlowKernelWarning, stacklevel=3)


def lesser_isa() -> str | None:
    """The instruction set the CPU kernels run on, where it is less than the processor's or the
    least of all; None: it is not.
    """
    runs, best = machine.isa(), machine.best_isa()
    if runs == best and runs != machine.ISAS[0]:
        return None
    return f"{runs} kernels" + (f" of a processor that has {best}" if runs != best else "")


def _products(module: Any) -> Iterator[str]:
    held = module.embedding if isinstance(module, PackedHead) else module
    if held.packed is None:
        return
    device = held.packed.device
    if device.type == "cpu":
        if (lesser := lesser_isa()) is not None:
            yield lesser
    elif held.format.kind in _WGMMA_KINDS and sqgemm.wgmma_failed(device):
        yield "mma kernels, since the warpgroup products failed their check here"


def _splits(module: nn.Module) -> bool:
    if isinstance(module, PackedGLU):
        return not module.fused()
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj")]
    return all(isinstance(getattr(p, "base_layer", p), PackedLinear) for p in parts)
