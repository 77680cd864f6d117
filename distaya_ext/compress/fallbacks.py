"""Where a run did something lesser than what was asked: counted by module, weighed, told.

A fallback is *degraded* when the numbers of its module cannot be trusted as those of the others
(docs/trust.md says why each line is drawn where it is); every other one is normal and counted all
the same. Nothing here touches a tensor.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import NumericsError
from .events import FellBack

KINDS = {
    "rank_zero": "no input was ever active, so nothing was learnt from the texts",
    "pivot_floor": "pivots of the Hessian were lifted",
    "rtn_columns": "inputs that no text reached, whose weights were only rounded",
    "aim_off": "fewer tokens than inputs, so errors of earlier layers were not made up for",
    "untrained": "quality high trained nothing",
    "skipped_windows": "calibration windows left out, because the model overflows on them",
    "slow_kernel": "a slower kernel than this processor could run",
}
UNSEEN_SHARE = 0.10  # of the inputs: more of them unseen, and the texts do not cover the module
FLOORED_SHARE = 0.01  # of the pivots (one is always normal): more, and damping did not do its work
EVERYWHERE = "all"  # the module of what holds for the whole run


@dataclass(frozen=True)
class Fallback:
    """kind: a key of KINDS. count: of columns, pivots, windows or modules, as `what` says."""

    module: str
    kind: str
    count: int
    what: str
    degraded: bool


def of_module(
    module: str, columns: int, tokens: int, *, floored: int, dead: int, learns: bool, aims: bool
) -> Iterator[Fallback]:
    """What the figures of one Linear with `columns` inputs tell.

    floored, dead: of its Hessian, see solve.Figures; learns: the method looks at texts; aims: it
    was asked to make up for errors of earlier layers.
    """
    if learns and dead >= columns:
        yield Fallback(module, "rank_zero", columns, f"none of {columns} inputs active", True)
        return
    if floored:
        bad = floored > max(1, int(FLOORED_SHARE * columns))
        yield Fallback(module, "pivot_floor", floored, f"{floored} of {columns} pivots", bad)
    if learns and dead:
        bad = dead > UNSEEN_SHARE * columns
        yield Fallback(module, "rtn_columns", dead, f"{dead} of {columns} inputs never seen", bad)
    if aims and tokens <= columns:
        yield Fallback(module, "aim_off", 1, f"{tokens} tokens for {columns} inputs", True)


@dataclass
class Fallbacks:
    """All of a run, in the order they were met."""

    found: list[Fallback] = field(default_factory=list)

    @classmethod
    def read(cls, summary: Mapping[str, Any]) -> Fallbacks:
        """Those of a results.json that summary() went into."""
        return cls([Fallback(**each) for each in summary.get("modules", [])])

    @staticmethod
    def told(folder: Path) -> str | None:
        """In words, what results.json of a folder says of the run that made it; None: nothing."""
        try:
            held = json.loads((folder / "results.json").read_text(encoding="utf-8"))["fallbacks"]
            kinds = ", ".join(f"{kind} in {count}" for kind, count in held["kinds"].items())
            return f"{held['degraded']} of {held['of']} modules degraded; {kinds or 'none'}"
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None

    def refuse(self) -> None:
        """NumericsError when something is degraded: what a strict run does."""
        if self.degraded:
            raise NumericsError(
                f"{self.sentence()}; --strict writes nothing then (without it the run goes on and "
                "says so)"
            )

    @property
    def degraded(self) -> list[str]:
        """Modules with a degraded fallback, each once."""
        return list(dict.fromkeys(each.module for each in self.found if each.degraded))

    def total(self, modules: int) -> bool:
        """Whether more than half of the run's modules are degraded: a failure of all of it."""
        return 2 * len(self.degraded) > modules

    def sentence(self) -> str:
        """The degraded modules: how many, of which kinds, and which come first."""
        kinds = Counter(each.kind for each in self.found if each.degraded)
        told = ", ".join(f"{kind} in {count}" for kind, count in kinds.items())
        first = [next(e for e in self.found if e.degraded and e.module == m) for m in self.degraded]
        some = "; ".join(f"{each.module}: {each.what}" for each in first[:3])
        more = f" and {len(first) - 3} more" if len(first) > 3 else ""
        s = "s are" if len(first) != 1 else " is"
        return f"{len(first)} module{s} degraded ({told}): {some}{more}"

    def lines(self) -> list[tuple[str, bool]]:
        """(a line per kind, whether it is degraded): counts, and the module that has it worst."""
        found = []
        for kind, meaning in KINDS.items():
            for degraded in (True, False):
                each = [e for e in self.found if e.kind == kind and e.degraded is degraded]
                if not each:
                    continue
                worst = max(each, key=lambda e: e.count)
                modules = len({e.module for e in each})
                s = "s" * (modules != 1)
                where = worst.module if modules == 1 else f"worst {worst.module}"
                line = f"{kind} in {modules} module{s}: {meaning} ({where}: {worst.what})"
                found.append((line, degraded))
        return sorted(found, key=lambda pair: not pair[1])

    def event(self, modules: int) -> FellBack | None:
        """What tells of them at the end of a run, None where there is nothing to tell."""
        if not self.found:
            return None
        degraded = len(self.degraded)
        return FellBack(tuple(self.lines()), degraded, modules, self.total(modules))

    def of(self, module: str) -> str:
        """Kinds and counts of one module, for a cell: "rtn_columns=3 aim_off=1"."""
        return " ".join(f"{e.kind}={e.count}" for e in self.found if e.module == module)

    def summary(self, modules: int) -> dict[str, Any]:
        """`fallbacks` of results.json for a run of so many modules. kinds: modules by kind."""
        counts = {kind: {e.module: e for e in self.found if e.kind == kind} for kind in KINDS}
        kinds = {
            kind: sum(e.count if e.module == EVERYWHERE else 1 for e in held.values())
            for kind, held in counts.items()
        }
        return {
            "kinds": {kind: count for kind, count in kinds.items() if count},
            "modules": [asdict(each) for each in self.found],
            "degraded": len(self.degraded),
            "of": modules,
            "total": self.total(modules) if modules else False,
        }
