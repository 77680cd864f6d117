"""One decoder layer compressed without data: the run's own code on tensors that have only shapes,
and every byte that is alive while it goes.

Nothing about memory is written twice this way: what a stage gathers, what waits on the tape, what a
sweep copies is counted where it happens. Tensors lie on torch's meta device, kernels do nothing
there, and a value that the code asks for is 1.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..checkpoint import Checkpoint
from ..models import Stage
from ..models.skeleton import build_skeleton
from .at_work import AtWork, Stack
from .blocks import threshold
from .calibrate import Calibration
from .capture import Ends, fill_layer
from .ferry import Checks, Ferry
from .languages import Mixture
from .left_out import LeftOut
from .packing import Packing
from .plan import Plan
from .replay import Replay
from .report import Report
from .store import Store
from .twin import Twin
from .walk import LayerWalk

_META = torch.device("meta")
_SCALAR = torch.ops.aten._local_scalar_dense.default
_ASKS = (_SCALAR, torch.ops.aten.equal.default)


class Live(TorchDispatchMode):
    """Memory of all tensors made inside the block that are still alive; phases: the most of it, by
    name, each up to its mark().

    A tensor of `threshold` bytes or more (None: none, see blocks.threshold) is mapped and goes when
    it dies. Other ones share a heap that does not shrink before trim(), and never where threshold
    is None: it counts with the most that it held since.
    """

    def __init__(self, threshold: int | None) -> None:
        super().__init__()
        self.threshold = threshold
        self.mapped = self.heap = self.high = self.most = 0
        self.phases: dict[str, int] = {}
        self._held: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ASKS and args[0].is_meta:
            kind = args[0].dtype
            yes = func is not _SCALAR or kind is torch.bool
            return True if yes else (1.0 if kind.is_floating_point else 1)
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._held:
            return
        size = storage.nbytes()

        large = self.threshold is not None and size >= self.threshold

        def gone(_: Any) -> None:
            del self._held[key]
            self._change(-size, large)

        self._held[key] = weakref.ref(storage, gone)
        self._change(size, large)

    def _change(self, size: int, large: bool) -> None:
        if large:
            self.mapped += size
        else:
            self.heap += size
            self.high = max(self.high, self.heap)
        self.most = max(self.most, self.mapped + self.high)

    def trim(self) -> None:
        """As blocks.trim()."""
        if self.threshold is not None:
            self.high = self.heap

    def mark(self, phase: str) -> None:
        """What went on since the last mark was `phase`."""
        self.phases[phase] = max(self.phases.get(phase, 0), self.most)
        self.most = self.mapped + self.high


class _AsOnTheCPU(TorchFunctionMode):
    """Attention as the CPU's kernel does it, the result and no matrix of weights; and autocast,
    which does not look at tensors without data.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        attends = func is nn.functional.scaled_dot_product_attention
        if (attends or func is nn.functional.linear) and torch.is_autocast_enabled("cpu"):
            kind = torch.get_autocast_dtype("cpu")
            args = tuple(x.to(kind) if isinstance(x, torch.Tensor) else x for x in args)
        if attends:
            return _Attended.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class _Spilled(Store):
    """As a Store with a folder: nothing stays in memory, what is asked for is read anew."""

    def put(self, key: Any, value: Any) -> None:
        self._items[key] = _shape(value)

    def get(self, key: Any) -> Any:
        return _anew(self._items[key])


def _shape(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_shape, value))
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else value


def _anew(value: Any) -> Any:
    if isinstance(value, tuple) and value and isinstance(value[0], torch.Size):
        return torch.empty(value[0], dtype=value[1], device=_META)
    return tuple(map(_anew, value)) if isinstance(value, tuple) else value


class _Ends(Ends):
    """Nothing is read: weights are shapes."""

    def _load(self, checkpoint: Checkpoint, device: torch.device) -> None:
        for module in self.model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(device))


class _Work(AtWork):
    """Marks what it does; what a file would hold of a module are its shapes."""

    live: Live

    def _gather(self, where: str, stage: Stage, *rest: Any) -> None:
        super()._gather(where, stage, *rest)
        self.live.mark(f"gathering for {stage.names[0]}")

    def _solve(self, prefix: str, layer: nn.Module, names: list[str], *rest: Any) -> Stack:
        found = super()._solve(prefix, layer, names, *rest)
        self.live.mark(f"solving {names[0]}")
        return found

    def _rest(self) -> None:
        self.live.trim()

    def _send(
        self, index: int, prefix: str, layer: nn.Module, stack: Stack, changed: dict[str, Any]
    ) -> None:
        for name, shape in stack.shapes.items():
            full = f"{prefix}.{name}"
            scheme = self.packing.planned.get(full)
            if scheme is None:
                changed[full] = {"weight": layer.get_submodule(name).weight.data}
                continue
            stack.grids[name].kept()
            parts = scheme.tensors(*shape, self.packing.dtype).items()
            changed[full] = {
                suffix: torch.empty(held or shape, dtype=dtype, device=_META)
                for suffix, (dtype, held) in parts
            }
        self.live.mark(f"encoding {stack.names[0]}")


@dataclass(frozen=True)
class Rehearsed:
    """Bytes alive at most in each phase of a layer, its mapped weights included, streams, too."""

    phases: dict[str, int]

    @property
    def most(self) -> int:
        return max(self.phases.values())


def rehearse(
    checkpoint: Checkpoint,
    plan: Plan,
    packing: Packing,
    index: int,
    calibration: Calibration | None,
    *,
    twin: bool = False,
    spilled: bool = False,
    weights: Any = "equal",
    careful: bool = False,
) -> Rehearsed:
    """Layer `index` with all tokens of the calibration (None: the method looks at none). careful:
    see blocks.threshold.
    """
    skeleton = build_skeleton(checkpoint.config, checkpoint.dtype)
    live = Live(threshold(checkpoint, careful=careful))
    with live, _AsOnTheCPU():
        replay = None
        if calibration is not None:
            replay = _replay(checkpoint, skeleton, calibration, twin, spilled, weights)
        _layer(live, checkpoint, skeleton, plan, packing, index, replay)
    return Rehearsed(live.phases)


def _replay(
    checkpoint: Checkpoint,
    skeleton: nn.Module,
    calibration: Calibration,
    twin: bool,
    spilled: bool,
    weights: Any,
) -> Replay:
    store = _Spilled if spilled else Store
    mixture = Mixture(calibration, weights if isinstance(weights, str) else "equal", _META)
    left_out = LeftOut(calibration, Report("", "", Path()))
    replay = Replay(calibration, store(), store(), mixture, left_out)
    if twin:
        replay.dense = (store(), store())
    ends = _Ends(skeleton, checkpoint, _META)
    replay.short = ends.inputs(calibration.ids[: replay.batch].to(_META))[1]
    for chunk, ids in enumerate(calibration.chunks()):
        hidden, calls = ends.inputs(ids.to(_META))
        replay.calls.add(calls)
        for at in (replay.hidden, *(replay.dense or ())[:1]):
            at.put(("hidden", chunk), torch.empty_like(hidden))
    return replay


def _layer(
    live: Live,
    checkpoint: Checkpoint,
    skeleton: nn.Module,
    plan: Plan,
    packing: Packing,
    index: int,
    replay: Replay | None,
) -> None:
    """As layers.Layers does it."""
    architecture = checkpoint.architecture
    prefix = f"{architecture.layers}.{index}"
    weightless = skeleton.get_submodule(prefix)
    # Views of the mapped file: their pages stay until the last view goes.
    mapped = {
        name: torch.empty(tensor.shape, dtype=checkpoint.dtype, device=_META)
        for name, tensor in weightless.state_dict().items()
    }
    layer = fill_layer(weightless, mapped, _META)
    live.mark("reading")
    checks = Checks(late=True)
    walk = twin = None
    if replay is not None:
        calls = [replay.calls.of(index, chunk) for chunk in range(len(replay.calls))]
        walk = LayerWalk(layer, architecture, calls, replay.hidden, replay.tape, checks)
        if replay.dense is not None:
            twin = Twin(
                fill_layer(weightless, mapped, _META), walk, architecture, calls, *replay.dense
            )
    with Ferry(torch.device("cpu")) as way:
        way.device = _META
        work = _Work(plan, packing, None, lambda event: None, way, checks)  # type: ignore[arg-type]
        work.live = live
        changed = work.compress(index, prefix, layer, architecture, replay, walk, twin)
        live.mark("training")
    if walk is not None:
        walk.finish()
        live.mark("running the finished layer")
        replay.account()
        live.mark("comparing with the dense stream")
    del changed, mapped
