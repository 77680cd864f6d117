"""What a search found: the recipe and the table it stands in."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..evaluate.statistics import interval
from ..recipe import Recipe
from .objective import weighted

_SAME = 0.02  # sizes that differ by no more than this share count as the same


@dataclass(frozen=True)
class Row:
    """One line of the table. bytes: of the weight files, at most; bits_per_weight: of the Linears.

    kl: mean over languages, in nats per token; worst: KL of the worst language; objective: the mix
    of the two that was minimised. same_size: a uniform choice of about the found recipe's size.
    """

    name: str
    bytes: int
    bits_per_weight: float
    objective: float
    kl: float
    kl_interval: tuple[float, float] | None
    worst: float
    worst_language: str
    kl_per_language: dict[str, float]
    searched: bool = False
    same_size: bool = False


def row(
    name: str,
    sizes: tuple[int, float],
    per_window: np.ndarray,
    of_window: np.ndarray,
    languages: list[str],
    alpha: float,
    **marks: bool,
) -> Row:
    """A line from the KL of every window."""
    count = np.bincount(of_window, minlength=len(languages))
    kl = np.bincount(of_window, weights=per_window, minlength=len(languages)) / count
    worst = int(kl.argmax())
    return Row(
        name=name,
        bytes=sizes[0],
        bits_per_weight=sizes[1],
        objective=weighted(kl, alpha),
        kl=float(kl.mean()),
        kl_interval=interval(per_window, np.ones(len(per_window))),
        worst=float(kl[worst]),
        worst_language=languages[worst],
        kl_per_language=dict(zip(languages, map(float, kl), strict=True)),
        **marks,
    )


def same_size(a: int, b: int) -> bool:
    return abs(a - b) <= _SAME * b


@dataclass(frozen=True)
class Found:
    """The result of a search.

    rows: the recipe's first, then uniform choices by size. predicted: the objective were single
    changes to add up, and decided: the one measured where it was decided (not the table's windows).
    exact: the allocation is proved to be the best one for that sum.
    """

    recipe: Recipe
    rows: list[Row]
    budget: dict[str, float | int | str]
    alpha: float
    predicted: float
    decided: float
    exact: bool
    accepted: int
    allocation: dict[str, str]
    dropped: list[int]
    cost: dict[str, Any]
    notices: list[str] = field(default_factory=list)

    @property
    def best(self) -> Row:
        """The row of the recipe."""
        return self.rows[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "budget": self.budget,
            "alpha": self.alpha,
            "predicted_objective": self.predicted,
            "decided_objective": self.decided,
            "exact": self.exact,
            "accepted_swaps": self.accepted,
            "dropped_layers": self.dropped,
            "allocation": self.allocation,
            "rows": [asdict(row) for row in self.rows],
            "cost": self.cost,
            "notices": self.notices,
        }
