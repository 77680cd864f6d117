"""What tasks found: a row per task and metric, model and base beside each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..evaluate.statistics import interval

Interval = tuple[float, float]


@dataclass(frozen=True)
class TaskRow:
    """One metric of one task, as lm-evaluation-harness computes it.

    value with a 95 % bootstrap interval over questions where it is their mean; base, delta = value
    - base and its paired interval only beside a base. Where each question is right or wrong, `lost`
    counts those that only the base had right, `won` those that only the model has, and p is that of
    mcnemar(). questions is None for a group of tasks.
    """

    task: str
    metric: str
    questions: int | None
    shots: int | None
    value: float
    value_interval: Interval | None = None
    base: float | None = None
    delta: float | None = None
    delta_interval: Interval | None = None
    lost: int | None = None
    won: int | None = None
    p: float | None = None


@dataclass(frozen=True)
class TaskResults:
    """All rows, in the order of the tasks' names; harness: its version."""

    model: str
    base: str | None
    rows: list[TaskRow]
    harness: str
    seconds: float
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, fields that do not apply left out."""
        rows = [{k: v for k, v in asdict(row).items() if v is not None} for row in self.rows]
        return {
            "model": self.model,
            "base": self.base,
            "lm_eval": self.harness,
            "tasks": rows,
            "seconds": round(self.seconds, 3),
            "notes": self.notes,
        }


def mcnemar(lost: int, won: int) -> float:
    """Two-sided p of the exact McNemar test (McNemar 1947): how often a fair coin divides the
    questions that only one of two models had right at least as unevenly as `lost` to `won`.
    """
    n = lost + won
    # Logarithms of n over k, all below the largest of them: whole numbers would have n digits.
    logs = [_log_choose(n, k) for k in range(min(lost, won) + 1)]
    tail = math.fsum(math.exp(log - logs[-1]) for log in logs)
    return min(1.0, 2 * tail * math.exp(logs[-1] - n * math.log(2)))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def rows_of(found: Mapping[str, Any], before: Mapping[str, Any] | None) -> list[TaskRow]:
    """Rows from what the harness gave for the model, and for the base."""
    rows = []
    for task in sorted(found["results"]):
        for key, value in found["results"][task].items():
            name, _, which = key.partition(",")
            if not which or name.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            metric = name if which == "none" else f"{name} ({which})"
            own = _per_question(found, task, name, which)
            shots = found["n-shot"].get(task)
            plain = {"task": task, "metric": metric, "questions": len(own) or None, "shots": shots}
            plain |= {"value": float(value), "value_interval": _spread(own, value)}
            if before is None:
                rows.append(TaskRow(**plain))
                continue
            base = float(before["results"][task][key])
            beside = _beside(own, _per_question(before, task, name, which), value, base)
            rows.append(TaskRow(**plain, base=base, delta=value - base, **beside))
    return rows


def _per_question(found: Mapping[str, Any], task: str, metric: str, which: str) -> dict[Any, float]:
    """Number of the question -> what the metric says of it; {} where that is no number."""
    samples: Sequence[Mapping[str, Any]] = found.get("samples", {}).get(task, [])
    values = {s["doc_id"]: s.get(metric) for s in samples if s["filter"] == which}
    plain = all(isinstance(v, (int, float, np.number)) for v in values.values())
    return {i: float(v) for i, v in values.items()} if plain else {}


def _is_mean(values: Mapping[Any, float], of_all: float) -> bool:
    return bool(values) and math.isclose(
        sum(values.values()) / len(values), of_all, rel_tol=1e-9, abs_tol=1e-12
    )


def _spread(values: Mapping[Any, float], of_all: float) -> Interval | None:
    if not _is_mean(values, of_all):
        return None
    return interval(np.array(list(values.values())), np.ones(len(values)))


def _beside(
    own: Mapping[Any, float], base: Mapping[Any, float], value: float, of_base: float
) -> dict[str, Any]:
    """The paired figures of two models on the same questions."""
    if own.keys() != base.keys() or not _is_mean(own, value) or not _is_mean(base, of_base):
        return {}
    difference = np.array([own[i] - base[i] for i in own])
    out: dict[str, Any] = {"delta_interval": interval(difference, np.ones(len(difference)))}
    if {*own.values(), *base.values()} <= {0.0, 1.0}:
        lost, won = int((difference < 0).sum()), int((difference > 0).sum())
        out |= {"lost": lost, "won": won, "p": mcnemar(lost, won)}
    return out
