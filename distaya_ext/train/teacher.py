"""What a teacher says of a batch: beside the student in memory, or from a cache on disk."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

import torch

from . import losses
from .cache import Cache
from .head import final_hidden, head_logits
from .hidden import captured
from .objective import Batch


class Said(Protocol):
    """A teacher on one batch. states: hidden states [rows, length, width] by number."""

    states: dict[int, torch.Tensor]

    def divergence(self, student: torch.Tensor, here: slice, temperature: float) -> torch.Tensor:
        """T^2 KL(teacher || student) [t] of the positions `here`, numbered among those that count,
        row after row; student: their logits [t, vocabulary].
        """
        ...


class Teacher(Protocol):
    """Where the distributions to learn from come from."""

    def say(self, batch: Batch, counted: torch.Tensor, states: Collection[int]) -> Said:
        """About a batch: counted bool [rows, length - 1], the hidden states that are wanted."""
        ...


class Online:
    """A model in memory, in its own dtype and without gradients; packed ones run on their kernels.

    vocabulary: logits that are compared, where the two models round theirs up differently.
    """

    def __init__(self, model: Any, vocabulary: int | None = None):
        self.model = model.eval().requires_grad_(False)
        self.vocabulary = vocabulary

    @torch.no_grad()
    def say(self, batch: Batch, counted: torch.Tensor, states: Collection[int]) -> Said:
        with _as_it_is(batch.ids), captured(self.model, states) as found:
            last = final_hidden(self.model, batch.ids)
        return _Thought(self, last[:, :-1][counted], found)


class _Thought:
    def __init__(self, teacher: Online, last: torch.Tensor, states: dict[int, torch.Tensor]):
        self.teacher, self.last, self.states = teacher, last, states

    def divergence(self, student: torch.Tensor, here: slice, temperature: float) -> torch.Tensor:
        few = self.teacher.vocabulary
        with torch.no_grad(), _as_it_is(student):
            logits = head_logits(self.teacher.model, self.last[here])
        return losses.divergence(logits[..., :few], student[..., :few], temperature)


class Cached:
    """A cache on disk, by the numbers of the rows."""

    def __init__(self, cache: Cache):
        self.cache = cache

    def say(self, batch: Batch, counted: torch.Tensor, states: Collection[int]) -> Said:
        """ValueError when hidden states are wanted: a cache has none."""
        if states:
            raise ValueError("a cache holds no hidden states")
        values, ids, rest = self.cache.rows(batch.rows)
        length, device = counted.shape[1], counted.device
        kept = [part[:, :length].to(device)[counted] for part in (values, ids, rest)]
        return _Record(*kept, vocabulary=self.cache.layout.vocabulary)


class _Record:
    def __init__(
        self, values: torch.Tensor, ids: torch.Tensor, rest: torch.Tensor, vocabulary: int
    ):
        self.values, self.ids, self.rest = values, ids, rest
        self.vocabulary = vocabulary
        self.states: dict[int, torch.Tensor] = {}

    def divergence(self, student: torch.Tensor, here: slice, temperature: float) -> torch.Tensor:
        student = student[..., : self.vocabulary]
        kept = (part[here] for part in (self.values, self.ids, self.rest))
        return losses.sparse_divergence(*kept, student, temperature)


def _as_it_is(tensor: torch.Tensor) -> torch.autocast:
    """No autocast inside: a teacher runs in its own dtype."""
    return torch.autocast(tensor.device.type, enabled=False)
