"""What is minimised: the mean KL of the languages, mixed with that of the worst.

    J(alpha) = (1 - alpha) * mean_l KL_l + alpha * max_l KL_l

An allocation's cost must be a sum over matrices, and the maximum is none. So languages get weights
v_l = (1 - alpha) / L + alpha * p_l, where p is the share of the rounds so far in which language l
was the worst (fictitious play, Brown 1951: it tends to the saddle point of the convex problem), and
the allocation is found anew until the worst language is one that the weights already answer. The
allocation of the least J met on the way is the one that counts.
"""

from __future__ import annotations

import numpy as np

from ..errors import UsageError
from .allocate import Allocation, Part, Unit, allocate

ALPHA = 0.5  # of "worst"
_ROUNDS = 24

# Per part: per unit (bytes [k], KL [k, languages]); what a dropped part costs (bytes, KL) or None.
UnitTable = tuple[np.ndarray, np.ndarray]
Dropped = tuple[int, np.ndarray] | None


def parse_weights(text: str) -> float:
    """alpha of "mean" (0), "worst" (0.5), "max" (1) or a number from 0 to 1."""
    named = {"mean": 0.0, "worst": ALPHA, "max": 1.0}
    if text in named:
        return named[text]
    try:
        alpha = float(text)
    except ValueError:
        alpha = -1.0
    if not 0.0 <= alpha <= 1.0:
        raise UsageError(f"weights {text!r} is none of mean, worst, max or a number from 0 to 1")
    return alpha


def weighted(kl: np.ndarray, alpha: float) -> float:
    """J of the KL per language [languages]."""
    return float((1 - alpha) * kl.mean() + alpha * kl.max())


def best_allocation(
    units: list[list[UnitTable]],
    base: list[int],
    dropped: list[Dropped],
    budget: int,
    alpha: float,
) -> tuple[np.ndarray, Allocation]:
    """The allocation of least J when KLs add up, and its KL per language.

    Everything is per part: its units, the bytes it takes unless it is dropped, and what dropping it
    costs (None: it cannot be).
    """
    languages = units[0][0][1].shape[1]
    met = np.zeros(languages)
    best: tuple[float, np.ndarray, Allocation] | None = None
    for done in range(_ROUNDS):
        share = met / done if done else np.full(languages, 1.0 / languages)
        v = (1 - alpha) / languages + alpha * share
        found = allocate(parts_of(units, base, dropped, v), budget)
        kl = total_kl(units, dropped, found.picks)
        if best is None or weighted(kl, alpha) < best[0]:
            best = (weighted(kl, alpha), kl, found)
        worst = int(kl.argmax())
        if alpha == 0.0 or (done and share[worst] == 1.0):
            break
        met[worst] += 1
    return best[1], best[2]


def total_kl(
    units: list[list[UnitTable]], dropped: list[Dropped], picks: list[list[int] | None]
) -> np.ndarray:
    """KL per language of an allocation, were the KLs of its changes to add up."""
    total = np.zeros(units[0][0][1].shape[1])
    for part, gone, taken in zip(units, dropped, picks, strict=True):
        if taken is None:
            total += gone[1]
        else:
            for (_, kl), pick in zip(part, taken, strict=True):
                total += kl[pick]
    return total


def parts_of(
    units: list[list[UnitTable]], base: list[int], dropped: list[Dropped], v: np.ndarray
) -> list[Part]:
    return [
        Part(
            [Unit(size, kl @ v) for size, kl in part],
            floor,
            None if gone is None else (gone[0], float(gone[1] @ v)),
        )
        for part, floor, gone in zip(units, base, dropped, strict=True)
    ]
