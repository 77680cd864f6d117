"""Limits that an evaluation may be held to, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from ..errors import GateError, UsageError

if TYPE_CHECKING:
    from .result import Evaluation


class Gate(NamedTuple):
    """What a limit needs, what it limits, the sentence when it is broken, whether 0 is one."""

    needs: str  # "base" or "continuations"
    what: str
    broken: Callable[[Evaluation, float], str | None]
    zero: bool = True


def _ppl_ratio(found: Evaluation, limit: float) -> str | None:
    worst = found.worst
    if worst.ppl_ratio <= limit:
        return None
    return (
        f"the worst language {worst.language} has {worst.ppl_ratio:.4f} times the perplexity "
        f"({limit:g} allowed)"
    )


def _gap(found: Evaluation, limit: float) -> str | None:
    if found.gap <= limit:
        return None
    worst = found.worst.language
    return f"the gap between {worst} and the median is {found.gap:.4f} nats ({limit:g} allowed)"


def _kl(found: Evaluation, limit: float) -> str | None:
    # Not a number is worse than all numbers: max() would let it depend on the order.
    row = max(found.languages, key=lambda r: math.inf if math.isnan(r.kl) else r.kl)
    if row.kl <= limit:
        return None
    return f"the KL of {row.language} is {row.kl:.4f} nats per token ({limit:g} allowed)"


def _wrong_script(found: Evaluation, limit: float) -> str | None:
    row = found.worst_script
    if row is None:
        return f"no language's wrong-script rate could be measured ({limit:g} allowed)"
    if row.wrong_script <= limit:
        return None
    base = row.base_wrong_script
    beside = "" if base is None else f", {base:.4f} before"
    return (
        f"{row.wrong_script:.4f} of the letters written in {row.language} are in a wrong script "
        f"({limit:g} allowed{beside})"
    )


GATES = {
    "max_worst_ppl_ratio": Gate(
        "base", "perplexity of the worst language over the base's", _ppl_ratio, zero=False
    ),
    "max_gap": Gate(
        "base", "nats per token that the worst language lost more than the median", _gap
    ),
    "max_kl": Gate("base", "mean KL to the base in any language, nats per token", _kl),
    "max_wrong_script": Gate(
        "continuations", "share of letters in a wrong script in any language", _wrong_script
    ),
}


def parse_gates(given: Iterable[str]) -> dict[str, float]:
    """["max_gap=0.1"] -> {"max_gap": 0.1}. UsageError with the list of gates for what is none."""
    limits: dict[str, float] = {}
    for text in given:
        name, equals, number = text.partition("=")
        name = name.strip().replace("-", "_")
        try:
            limit = float(number)
        except ValueError:
            why = f"{number!r} is no number" if equals else "the number is missing"
            raise UsageError(f"gate {text!r}: {why}; write {_all('=N')}") from None
        if name in limits:
            raise UsageError(f"gate {name} is given twice")
        limits[name] = limit
    check_limits(limits)
    return limits


def check_limits(limits: Mapping[str, float]) -> None:
    """UsageError unless these are limits of gates there are."""
    for name, limit in limits.items():
        if name not in GATES:
            raise UsageError(f"there is no gate {name!r}; there are {_all()}")
        if not 0 <= limit < math.inf or (limit == 0 and not GATES[name].zero):
            above = "0 or more" if GATES[name].zero else "above 0"
            raise UsageError(f"gate {name} must be a number {above}, not {limit:g}")


def check_possible(limits: Mapping[str, float], *, base: bool, continuations: bool) -> None:
    """UsageError, before any work, for a gate that needs a model to compare with, or continuations,
    where there will be none.
    """
    for name in limits:
        if GATES[name].needs == "base" and not base:
            raise UsageError(f"gate {name} compares two models, so it needs --against")
        if GATES[name].needs == "continuations" and not continuations:
            raise UsageError(f"gate {name} judges continuations, and none are asked for")


def check(found: Evaluation, limits: Mapping[str, float]) -> None:
    """GateError naming each limit that is broken; a figure that is not a number breaks any."""
    check_limits(limits)
    check_possible(limits, base=found.compared, continuations=found.written is not None)
    failed = [GATES[name].broken(found, limit) for name, limit in limits.items()]
    if said := [sentence for sentence in failed if sentence is not None]:
        raise GateError("quality gate failed: " + " and ".join(said))


def _all(end: str = "") -> str:
    return ", ".join(name + end for name in GATES)
