"""What a training run found, apart from any model: what merging reads."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

PRUNED = 0.05  # share of exact zeros from which a matrix counts as pruned; 15 of 16 kept are 0.0625


@dataclass(frozen=True)
class LowRank:
    """An update alpha / rank B A of a matrix [rows, cols] (LoRA, arXiv 2106.09685).

    A [rank, cols], B [rows, rank], both on the CPU and of one float dtype
    """

    A: Tensor
    B: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    @property
    def nbytes(self) -> int:
        return self.A.nbytes + self.B.nbytes

    def delta(self) -> Tensor:
        """The update, float32 [rows, cols]."""
        return (self.B.float() * self.scaling) @ self.A.float()


@dataclass(frozen=True)
class Learned:
    """Updates and new values by the names of the model.

    low_rank  by module ("model.layers.0.mlp.up_proj")
    tensors   new values of dense tensors by tensor ("model.norm.weight"), any float dtype
    scales    new scales [rows, groups] of quantised modules by module, in the dtype they have
    masked    updates of pruned matrices were trained under their mask
    """

    low_rank: dict[str, LowRank] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    masked: bool = False


def is_pruned(W: Tensor) -> bool:
    """Whether the zeros of a matrix are a pattern that must stay: more than 5 % of it.

    That takes in every N:M pattern up to 15:16.
    """
    return W.dim() == 2 and int((W == 0).sum()) > PRUNED * W.numel()


def rounded(new: Tensor, old: Tensor, keep: bool) -> Tensor:
    """new rounded once to the dtype of old and, with keep, 0 exactly where old is 0.

    What would round to 0 elsewhere becomes the smallest number of old's sign: a weight that is kept
    stays kept.
    """
    found = new.to(old.dtype)
    if not keep:
        return found
    kept = old != 0
    smallest = torch.copysign(torch.full_like(old, torch.finfo(old.dtype).tiny), old)
    return torch.where(found == 0, smallest, found).masked_fill_(~kept, 0)
