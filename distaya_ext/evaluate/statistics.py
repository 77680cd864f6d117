"""Maths: confidence intervals by resampling whole windows or sentences, never single tokens."""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000
SEED = 20240611
_AT_ONCE = 1 << 22  # indices drawn at a time


def interval(
    sums: np.ndarray, weights: np.ndarray, *, level: float = 0.95, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of sum(sums) / sum(weights), both float64 [samples].

    Tokens of one sample depend on each other, so samples are what is drawn (with replacement; the
    seed is fixed). With paired differences in `sums` this is the paired bootstrap (Efron &
    Tibshirani 1993, ch. 13). None for fewer than two samples, which say nothing about spread.
    """
    n = len(sums)
    if n < 2:
        return None
    rng = np.random.default_rng(SEED)
    ratios = np.empty(resamples)
    step = max(1, _AT_ONCE // n)
    for start in range(0, resamples, step):
        stop = min(resamples, start + step)
        drawn = rng.integers(0, n, size=(stop - start, n))
        ratios[start:stop] = sums[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def difference_interval(
    sums: np.ndarray,
    weights: np.ndarray,
    base_sums: np.ndarray,
    base_weights: np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> tuple[float, float] | None:
    """Paired bootstrap interval of sum(sums)/sum(weights) - sum(base_sums)/sum(base_weights).

    All float64 [samples]; the same samples are drawn for both, as interval() does. Draws in which
    either side weighs nothing are left out; None for fewer than two samples, and where nothing is
    left.
    """
    n = len(sums)
    if n < 2:
        return None
    drawn = np.random.default_rng(SEED).integers(0, n, size=(resamples, n))
    parts = [column[drawn].sum(axis=1) for column in (sums, weights, base_sums, base_weights)]
    known = (parts[1] > 0) & (parts[3] > 0)
    if not known.any():
        return None
    own, own_weight, base, base_weight = (part[known] for part in parts)
    found = own / own_weight - base / base_weight
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
