"""Matrices with too few calibration tokens for their Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checkpoint import Checkpoint
from ..compress.plan import Plan

FEW = 4  # tokens per column below which a Hessian is mostly noise in its small directions


@dataclass(frozen=True)
class Rank:
    """Matrices of one name with fewer tokens than FEW per column. missing: directions of the input
    in which the calibration says nothing at all (columns - tokens), 0 where there are none.
    """

    module: str
    matrices: int
    columns: int
    tokens: int
    missing: int

    @property
    def sentence(self) -> str:
        where = f"{self.matrices} x {self.module}: {self.tokens} tokens for {self.columns} columns"
        if self.missing:
            return (
                f"{where}, so their Hessians have rank {self.tokens} at most and {self.missing} "
                "directions are decided by damping alone"
            )
        return f"{where} are few; {FEW * self.columns} or more are advised"

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "sentence": self.sentence}


def ranks_of(checkpoint: Checkpoint, plan: Plan, tokens: int) -> list[Rank]:
    """By name within a layer, in the order of the model."""
    found: dict[str, Rank] = {}
    start = f"{checkpoint.architecture.layers}."
    for full, settings in plan.items():
        if settings.statistic != "hessian":
            continue
        columns = checkpoint.entries[f"{full}.weight"].shape[1]
        if tokens >= FEW * columns:
            continue
        name = full.removeprefix(start).partition(".")[2]
        count = found[name].matrices + 1 if name in found else 1
        found[name] = Rank(name, count, columns, tokens, max(0, columns - tokens))
    return list(found.values())
