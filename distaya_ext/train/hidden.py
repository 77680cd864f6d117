"""Hidden states of a student beside those of its teacher: which is compared with which, how they
are taken from a forward pass, and the projector where the widths differ.

State 0 is what goes into the first decoder layer, state i the output of layer i - 1, the last one
before the final norm.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..errors import UsageError
from ..models import describe

Pairs = list[tuple[int, int]]


def source_layers(folder: Path, depth: int, teacher_depth: int) -> tuple[int, ...] | None:
    """Which of the teacher's layers the student in a folder of ours still has, from results.json
    or, where it was trained since, training.json; None where nothing was dropped or the numbers do
    not fit this teacher.
    """
    for name in ("results.json", "training.json"):
        try:
            about = json.loads((folder / name).read_text(encoding="utf-8"))
            dropped = sorted(about["dropped_layers"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another writer's folder, or one of ours that is whole
        known = all(type(i) is int and 0 <= i < teacher_depth for i in dropped)
        if dropped and known and len(set(dropped)) == teacher_depth - depth:
            return tuple(i for i in range(teacher_depth) if i not in dropped)
    return None


def pairs(
    layers: Literal["last", "all"] | Sequence[tuple[int, int]],
    depth: int,
    teacher_depth: int,
    source: Sequence[int] | None = None,
) -> Pairs:
    """(student, teacher) numbers of the states that are compared.

    last   the outputs of the last layers
    all    every layer of the student. With source, the teacher's layer each of them came from: its
           output should be what that layer gave in the teacher; the last one's what the teacher's
           last layer gives, because the head comes next. Without it the layers of the shallower
           model spread evenly over the other's, last on last.
    pairs  as they are given. UsageError naming those that a model has not, and both depths.
    """
    if layers == "last":
        return [(depth, teacher_depth)]
    if layers == "all":
        if source is not None:
            inner = [(i + 1, layer + 1) for i, layer in enumerate(source[:-1])]
            return [*inner, (depth, teacher_depth)]
        few = min(depth, teacher_depth)
        return [(_spread(i, few, depth), _spread(i, few, teacher_depth)) for i in range(1, few + 1)]
    given = [(int(s), int(t)) for s, t in layers]
    if not given:
        raise UsageError("the list of layers to compare is empty; leave it out, or say last or all")
    wrong = [f"{s}:{t}" for s, t in given if not (0 <= s <= depth and 0 <= t <= teacher_depth)]
    if wrong:
        raise UsageError(
            f"layers {', '.join(wrong)} (student:teacher) name states that are not there: the "
            f"student has {depth} layers, states 0 to {depth}, and the teacher {teacher_depth}, "
            f"states 0 to {teacher_depth}"
        )
    if twice := sorted({f"{s}:{t}" for s, t in given if given.count((s, t)) > 1}):
        raise UsageError(f"layers {', '.join(twice)} (student:teacher) are named twice")
    return given


def _spread(step: int, steps: int, depth: int) -> int:
    return (2 * step * depth + steps) // (2 * steps)  # step * depth / steps, halves up


class Projector(nn.Module):
    """P of |P h_s - h_t|: a Linear [teacher width, student width] without bias in float32, one for
    all pairs, since the layers of a model share one residual stream. Where the widths are equal
    there is none and states pass as they are. It begins with orthonormal columns (or rows, where
    the teacher is narrower), the same for the same seed.
    """

    def __init__(self, width: int, teacher_width: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        long, short = max(width, teacher_width), min(width, teacher_width)
        Q, R = torch.linalg.qr(
            torch.randn(long, short, dtype=torch.float64, generator=generator, device="cpu")
        )
        Q = Q * R.diagonal().sign()  # one factor, whatever signs a library chooses
        W = Q if teacher_width >= width else Q.T
        self.linear = nn.Linear(width, teacher_width, bias=False)
        self.linear.weight.data = W.float().contiguous()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden.to(self.linear.weight.dtype))


def projector(width: int, teacher_width: int, seed: int = 0) -> Projector | None:
    """The projector two widths need, None where they are equal."""
    return None if width == teacher_width else Projector(width, teacher_width, seed)


@contextmanager
def captured(model: Any, wanted: Collection[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Inside, a forward pass of the causal language model leaves the wanted states [rows, length,
    hidden] in the dictionary, with their gradients.
    """
    architecture = describe(model.config)
    readers = [*model.get_submodule(architecture.layers), model.get_submodule(architecture.norm)]
    found: dict[int, torch.Tensor] = {}

    def note(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[index] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return hook

    hooks = [readers[i].register_forward_pre_hook(note(i), with_kwargs=True) for i in wanted]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
