"""The last stage of quality "high": a layer's attention and MLP are trained on the layer's output.

What the sweeps fixed stays fixed: masks, and codes where weights were rounded. Trained are the kept
weights of Linears that are not rounded and the scales of those that are, in fp32, by Adam on the
squared distance between the layer's output and that of the dense stream. Every eighth calibration
window is held out; of all epochs, and of no training at all, the one that comes closest on those
windows is kept.

Source of the idea: block-wise reconstruction, BRECQ (Li et al. 2021), and for pruned models
Wagner et al. 2025 (2510.14444), who train attention and MLP one by one; in a parallel block the two
add up to one output, so here they are trained together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call

from ..ranks import PartSums, Sum
from .calibrate import Calibration
from .capture import Call
from .languages import Mixture
from .store import Store

if TYPE_CHECKING:
    from .at_work import Stack

EPOCHS = 2
HELD_OUT = 8  # every eighth window
STEP = 0.02  # step of Adam, as a share of the root mean square of the weights trained
SCALE_STEP = 0.002  # the same of scales
BATCH_TOKENS = 2048  # per step: a window where that is longer


@dataclass
class Batch:
    """inputs and targets [windows, length, hidden]; each: fp32 [windows], what a window counts."""

    inputs: torch.Tensor
    targets: torch.Tensor
    each: torch.Tensor | None


@dataclass
class Course:
    """What to train on. call: the layer's call for `windows` windows; inputs and targets hold
    [n, length, hidden] under ("hidden", chunk) of a chunk of the calibration; mixture: what each
    window counts; seed: of the order; left_out: numbers of the windows that are not used, see
    LeftOut.

    A step takes one batch of every part of the calibration that has one left, and its gradient is
    their sum.
    """

    call: Call
    windows: int
    inputs: Store
    targets: Store
    calibration: Calibration
    mixture: Mixture
    seed: int = 0
    left_out: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        return len(self.calibration.ids)

    @property
    def own_parts(self) -> list[range]:
        """The chunks of each part that this process runs."""
        return self.calibration.own_parts

    @property
    def device(self) -> torch.device:
        return self.mixture.shares.device

    def adding(self, sums: list[Sum]) -> PartSums:
        """For sums over the batches of all parts: close() after each part, then finish()."""
        return PartSums(self.calibration.parts, sums)

    def usable(self, here: slice, held: bool) -> torch.Tensor:
        """Which of these windows are trained on (or held out), their places among them."""
        numbers = torch.arange(here.start, here.stop)
        wanted = (numbers % HELD_OUT == HELD_OUT - 1) == held
        for number in self.left_out:
            wanted &= numbers != number
        return wanted.nonzero().flatten()

    def steps(self, held: bool) -> int:
        """Batches of the part that has most, whichever process runs it."""
        most = 0
        for chunks in self.calibration.of_every_part():
            counts = [len(self.usable(here, held)) for here in chunks]
            most = max(most, sum(-(-count // self.windows) for count in counts))
        return most

    def places(self, part: int, held: bool, epoch: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(chunk, rows) of the batches of one of this process's parts, `windows` windows each,
        chunk by chunk; the last batch of a chunk is filled up with its first windows.
        """
        own, number = self.own_parts[part], self.calibration.parts.own[part]
        order = torch.Generator().manual_seed(1000003 * self.seed + epoch + 7919 * number)
        chunks = [own[i] for i in torch.randperm(len(own), generator=order).tolist()]
        for chunk in own if held else chunks:
            rows = self.usable(self.calibration.windows(chunk), held)
            if not len(rows):
                continue
            if not held:
                rows = rows[torch.randperm(len(rows), generator=order)]
            short = -len(rows) % self.windows
            rows = torch.cat([rows, rows.repeat(-(-short // len(rows)))[:short]])
            for part in rows.split(self.windows):
                yield chunk, part

    def batches(self, part: int, held: bool, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, or of the held-out windows, of one of this process's parts."""
        at, x, y = -1, None, None
        for chunk, rows in self.places(part, held, epoch):
            if chunk != at:
                at = chunk
                x, y = (store.get(("hidden", chunk)) for store in (self.inputs, self.targets))
            here = rows.to(x.device, non_blocking=True)
            each = self.mixture.of_windows(chunk)
            yield Batch(x[here], y[here], None if each is None else each[here])


class _Trained:
    """One Linear: the tensor that is trained, and the weight that follows from it."""

    def __init__(self, layer: nn.Module, name: str, stack: Stack):
        self.linear, self.name, self.stack = layer.get_submodule(name), name, stack
        self.grid = stack.grids.get(name)
        W = self.linear.weight.data
        if self.grid is None:
            mask = None if stack.masks is None else stack.masks[name]
            # In fp32: multiplying by booleans would convert them in every step, twice.
            self.fixed = torch.ones_like(W, dtype=torch.float32) if mask is None else mask.float()
            theta, kept = W.float(), self.fixed.sum().clamp(min=1)
            step = STEP * float((theta.square().sum() / kept).sqrt())
        else:
            self.fixed = self.grid.centred().float()
            # A scale changes by shares of itself.
            theta = torch.ones_like(self.grid.scales, dtype=torch.float32)
            step = SCALE_STEP
        self.theta = theta.clone().requires_grad_(True)
        self.step = step
        self.best = theta

    def weight(self) -> torch.Tensor:
        """fp32 [rows, columns], differentiable in theta."""
        if self.grid is None:
            return self.theta * self.fixed
        return self.grid.spread(self.theta * self.grid.scales.float()) * self.fixed

    def keep(self, better: torch.Tensor) -> None:
        """Note theta as the best where the flag on the device says so."""
        self.best = torch.where(better, self.theta.detach(), self.best)

    def settle(self) -> None:
        """Put the best into the layer, and into what the file will hold."""
        with torch.no_grad():
            self.theta.copy_(self.best)
            dtype = self.linear.weight.dtype
            if self.grid is not None:
                scales = self.theta * self.grid.scales.float()
                self.grid = replace(self.grid, scales=scales.to(self.grid.scales.dtype))
                self.stack.grids[self.name] = self.grid
                self.theta.fill_(1)
            self.linear.weight.data = self.weight().to(dtype)


def reconstruct(layer: nn.Module, stacks: list[Stack], course: Course) -> dict[str, torch.Tensor]:
    """Train the Linears of the stacks in place. The host waits for the device once, for the sizes
    of the steps.

    Returns the mean squared error on the held-out windows over the mean square of the targets,
    fp32 [] on the device: "before", and "after" as kept. With fewer than HELD_OUT windows nothing
    could be held out, so nothing is done and the result is empty.
    """
    if course.total < HELD_OUT or not all(course.steps(held) for held in (True, False)):
        return {}
    trained = [
        _Trained(layer, name, stack)
        for stack in stacks
        if stack.settings.quality == "high"
        for name in stack.names
        # Groups of an activation order are no grid; they keep their weights.
        if stack.settings.bits is None or name in stack.grids
    ]
    if not trained:
        return {}
    rest = {k: v.detach().float() for k, v in layer.named_parameters()}
    call = course.call.in_float()
    least = before = _held_out(layer, call, rest, trained, course)
    groups = [{"params": [t.theta], "lr": t.step} for t in trained]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=not least.is_meta)
    energy = _energy(course)
    steps, done = course.steps(False), 0
    for t in trained:
        t.theta.grad = torch.zeros_like(t.theta)
    for epoch in range(EPOCHS):
        own = [course.batches(part, False, epoch) for part in range(len(course.own_parts))]
        for _ in range(steps):
            share = 0.5 * (1 + math.cos(math.pi * done / (EPOCHS * steps)))
            for group, t in zip(adam.param_groups, trained, strict=True):
                group["lr"] = t.step * share
            adam.zero_grad(set_to_none=False)
            adding = course.adding([Sum(t.theta.grad) for t in trained])
            for batches in own:
                batch = next(batches, None)
                if batch is not None:
                    loss, _ = _distance(layer, call, rest, trained, batch)
                    (loss / energy).backward()
                adding.close()
            adding.finish()
            adam.step()
            done += 1
        now = _held_out(layer, call, rest, trained, course)
        for t in trained:
            t.keep(now < least)
        least = torch.where(now < least, now, least)  # not minimum(): NaN must not win
    for t in trained:
        t.settle()
    return {"before": before, "after": least}


def _distance(
    layer: nn.Module,
    call: Call,
    rest: dict[str, torch.Tensor],
    trained: list[_Trained],
    batch: Batch,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distance of the layer's output from the targets, and the square of the targets: sums
    over windows, of their means over the rest.
    """
    weights = rest | {f"{t.name}.weight": t.weight() for t in trained}
    x, y = batch.inputs, batch.targets.float()

    def run(*args: Any, **kwargs: Any) -> Any:
        return functional_call(layer, weights, args, kwargs)

    kind = "cpu" if x.is_meta else x.device.type  # see dry.py
    with torch.autocast(kind, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        out = call.run(run, x.float())
    return _counted((out.float() - y).square(), batch), _counted(y.square(), batch)


def _counted(squares: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum over windows, as they count, of their means."""
    means = squares.mean((1, 2))
    return means @ (torch.ones_like(means) if batch.each is None else batch.each)


def _energy(course: Course) -> torch.Tensor:
    """Square of the targets of a step's batches in the mean: one divisor for all steps, since its
    own would cancel what a batch of one language counts.
    """
    total = torch.zeros(2, device=course.device)  # the squares, how many batches
    one = torch.ones((), device=course.device)
    adding = course.adding([Sum(total)])
    for part in range(len(course.own_parts)):
        for batch in course.batches(part, False, 0):
            total += torch.stack([_counted(batch.targets.float().square(), batch), one])
        adding.close()
    adding.finish()
    return (total[0] / total[1]).clamp_min(1e-30) * course.calibration.parts.count


@torch.no_grad()
def _held_out(
    layer: nn.Module,
    call: Call,
    rest: dict[str, torch.Tensor],
    trained: list[_Trained],
    course: Course,
) -> torch.Tensor:
    """Relative squared distance over the held-out windows, fp32 []."""
    total = torch.zeros(2, device=course.device)
    adding = course.adding([Sum(total)])
    for part in range(len(course.own_parts)):
        for batch in course.batches(part, True, 0):
            total += torch.stack(_distance(layer, call, rest, trained, batch))
        adding.close()
    adding.finish()
    return total[0] / total[1].clamp_min(1e-30)  # windows may count nothing
