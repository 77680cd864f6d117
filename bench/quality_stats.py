"""Figures of the quality bench with their 95 % intervals, from the records alone.

Seeds are pooled first: of every test window, the mean over calibration seeds of how much more
it surprises than under the base model. Then windows are drawn with replacement within each
language (Efron & Tibshirani 1993, ch. 13: paired and stratified), the same draws for every row, so
that a ratio of two rows is paired too. What varies in an interval is the test text; the spread over
calibration seeds is told beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.quality_rows import Row, rows
from bench.quality_store import Record, Store

RESAMPLES = 2000
SEED = 20240611
Interval = tuple[float, float]


@dataclass(frozen=True)
class Figures:
    """A row of the table. delta, worst, kl in nats per token; ratio: delta over the reference's.

    delta is the mean over languages; worst belongs to the language with the largest delta, its
    interval to that same language. spread: standard deviation of delta over seeds. seconds: median
    of timed rounds (timed) or of the runs that made the rows. slower: seconds over those of plain,
    from timed rounds alone. None: not known.
    """

    row: Row
    seeds: int
    delta: float
    delta_interval: Interval
    spread: float | None
    worst_language: str
    worst: float
    worst_interval: Interval
    kl: float
    kl_p99: float
    agreement: float
    bits: float
    seconds: float
    timed: bool
    slower: float | None = None
    ratio: float | None = None
    ratio_interval: Interval | None = None


class Draws:
    """How often each window of each language is drawn, [resamples, windows], seeded."""

    def __init__(self, windows: dict[str, int], resamples: int = RESAMPLES):
        rng = np.random.default_rng(SEED)
        self.counts = {
            lang: rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n
            for lang, n in windows.items()
        }

    def language(self, lang: str, values: np.ndarray) -> np.ndarray:
        """The mean of a language in every resample, [resamples]."""
        return self.counts[lang] @ values

    def mean(self, values: dict[str, np.ndarray]) -> np.ndarray:
        """The mean over languages in every resample, [resamples]."""
        return np.mean([self.language(lang, v) for lang, v in values.items()], axis=0)


def interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """Percentile interval of resampled values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def rows_in(store: Store) -> list[Row]:
    """The rows that have records or are known to be missing, in the order of the table."""
    known = {key for key, _ in store.records} | set(store.missing)
    return [row for row in rows() if row.key in known]


def figures(store: Store, chosen: Sequence[Row]) -> list[Figures]:
    """Figures of those of the chosen rows that have records, in their order."""
    made = [row for row in chosen if store.seeds(row.key)]
    if not made:
        return []
    some = next(iter(store.records.values()))
    draws = Draws({lang: len(v) for lang, v in some["windows"].items()})
    return [_figures(row, store, draws) for row in made]


def pooled(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """{language: mean over records of the delta of every window, [windows]}."""
    return {
        lang: np.mean([record["windows"][lang] for record in records], axis=0)
        for lang in records[0]["windows"]
    }


def _figures(row: Row, store: Store, draws: Draws) -> Figures:
    by_seed = store.seeds(row.key)
    records = list(by_seed.values())
    windows = pooled(records)
    each = {lang: float(v.mean()) for lang, v in windows.items()}
    worst = max(each, key=each.__getitem__)
    deltas = [r["delta"] for r in records]
    timed = store.timing.get("rows", {}).get(row.key)
    ratio, bounds = _ratio(by_seed, store.seeds(row.reference), draws)
    if row.key == row.reference:
        ratio = bounds = None
    return Figures(
        row=row,
        seeds=len(records),
        delta=float(np.mean(list(each.values()))),
        delta_interval=interval(draws.mean(windows)),
        spread=statistics.stdev(deltas) if len(deltas) > 1 else None,
        worst_language=worst,
        worst=each[worst],
        worst_interval=interval(draws.language(worst, windows[worst])),
        seconds=statistics.median(timed or [r["seconds"] for r in records]),
        timed=timed is not None,
        slower=_slower(row, store),
        ratio=ratio,
        ratio_interval=bounds,
        **{
            name: statistics.fmean(r[name] for r in records)
            for name in ("kl", "kl_p99", "agreement", "bits")
        },
    )


def _ratio(own: dict, other: dict, draws: Draws) -> tuple[float | None, Interval | None]:
    """Delta over the reference's on the calibration seeds both have; one without seeds fits all."""
    common = [s for s in own if s in other]
    if None in own or None in other:
        mine, theirs = list(own.values()), list(other.values())
    else:
        mine, theirs = [own[s] for s in common], [other[s] for s in common]
    if not mine or not theirs:
        return None, None
    top, bottom = draws.mean(pooled(mine)), draws.mean(pooled(theirs))
    if _mean(theirs) <= 0:  # it lost nothing, so there is nothing to be a share of
        return None, None
    return _mean(mine) / _mean(theirs), interval(top / bottom) if bottom.min() > 0 else None


def _mean(records: Sequence[Record]) -> float:
    return float(np.mean([v.mean() for v in pooled(records).values()]))


def _slower(row: Row, store: Store) -> float | None:
    """Median seconds over those of the plain sweep at the same pattern, both from timed rounds."""
    timed = store.timing.get("rows", {})
    plain = timed.get(f"{row.pattern.name} | ours-plain")
    if row.side != "ours" or row.key not in timed or not plain:
        return None
    return statistics.median(timed[row.key]) / statistics.median(plain)
