"""search(): the best recipe for a budget of bytes, from measured sensitivities."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint import Checkpoint, open_checkpoint
from ..compress import events
from ..compress.packing import Packing
from ..compress.store import Store
from ..device import find_device
from ..errors import UsageError
from ..ranks import Parts, team
from .allocate import least_bytes
from .candidate import Candidate, Judge, Space
from .choices import Choice, Costs, parse_choices, untouched
from .objective import best_allocation, parse_weights, parts_of, weighted
from .options import Options
from .polish import Measure, polish, polish_together
from .prepare import Sets, cut, make_units, plan_memory
from .result import Found, Row, row, same_size
from .rules import to_recipe
from .sensitivity import OnProgress, Seconds, Sensitivities, Walk
from .variants import Variants
from .whole import Whole, Windows


def search(
    model: str | Path,
    texts: Any,
    options: Options,
    *,
    on_event: Callable[[events.Event], None] | None = None,
    on_progress: OnProgress | None = None,
    device: str = "cpu",
    offline: bool = False,
    scratch: Path | None = None,
) -> Found:
    """The recipe that loses least within the budget, and the table of uniform choices beside it.

    model, texts, device and offline as in compress(). The texts give the windows of the Hessians,
    others that decide and others that the table reports; the recipe that is found calibrates on
    the folder. scratch is where variants lie that have no room in memory (None: the system's
    folder). Raises InputError, UsageError and ResourceError in one sentence.

    Under ranks each is to call this with the same arguments, and gets the same; rank 0 cuts the
    texts, decides, and calls on_event and on_progress.
    """
    if not team().first:
        on_event = on_progress = None
    place = find_device(device, kernels=True)
    alpha, choices = parse_weights(options.weights), parse_choices(options.choices)
    checkpoint = open_checkpoint(model, offline=offline)
    if isinstance(texts, (str, Path)):
        spec = options.calibration.model_copy(update={"path": str(texts)})
        options = replace(options, calibration=spec)
    task = _Task(model, checkpoint, options, alpha, choices, on_event or (lambda event: None))
    with tempfile.TemporaryDirectory(dir=scratch, prefix="distaya-search-") as folder:
        return task.go(texts, place, Path(folder), on_progress or (lambda *_: None))


class _Task:
    """One search: the space of candidates first, so that an impossible budget costs nothing."""

    def __init__(
        self,
        model: str | Path,
        checkpoint: Checkpoint,
        options: Options,
        alpha: float,
        choices: list[Choice],
        on_event: Callable[[events.Event], None],
    ):
        self.checkpoint, self.options, self.alpha = checkpoint, options, alpha
        self.choices, self.on_event = choices, on_event
        self.notices: list[str] = []
        self.common = {"model": str(model), **options.common()}
        self.costs = Costs(checkpoint, choices, self.common)
        units = make_units(self.costs, options.per)
        whole_files = options.bits_per_weight is None
        self.space = Space(self.costs, units, whole_files=whole_files, drop=options.drop)
        if whole_files:
            self.budget = options.target_bytes()
        else:
            self.budget = int(options.bits_per_weight * self.space.weights / 8)
        self.seconds, self.start, self.made = Seconds(), time.perf_counter(), 0
        self._measured: dict[Candidate, np.ndarray] = {}  # on the table's windows
        self._check_budget()

    def _check_budget(self) -> None:
        """UsageError with the nearest possible budget when this one is too small."""
        none = np.zeros(1)
        free = Sensitivities(
            {unit: np.zeros((len(unit.choices), 1)) for unit in self.space.units},
            dict.fromkeys(self.space.layers, none),
        )
        parts = parts_of(*self.space.tables(free), np.ones(1))
        least = self.space.fixed + least_bytes(parts)
        if least > self.budget:
            raise UsageError(
                f"the budget of {self._amount(self.budget)} cannot be met: the smallest that these "
                f"choices reach is {self._amount(least)}"
            )

    def _amount(self, count: int) -> str:
        """Bytes in the terms of the budget, rounded up."""
        if self.space.whole_files:
            return f"{count} bytes ({-(-count // 10**4) / 1e5:.5f} GB)"
        return f"{-(-8 * count * 10**4 // self.space.weights) / 1e4:.4f} bits per weight"

    # ---- the run ----

    def open(self, texts: Any, place: torch.device, folder: Path) -> None:
        """Cut the texts, load the model, and note what the dense one says of the windows."""
        sets = cut(texts, self.options, self.checkpoint)
        self._tell_few(sets)
        parts = Parts.dealt(self.options.calibration.parts or team().world)
        memory = plan_memory(
            self.checkpoint, self.costs, sets, self.options.max_ram, place, len(parts.own)
        )
        self.whole = Whole(self.checkpoint, place)
        spill = folder if memory.spills else None
        self.hessian, self.parts, self.streams = sets.hessian, parts, Store(spill)
        self.decide = Windows(self.whole, *sets.decide, spill)
        self.report = Windows(self.whole, *sets.report, spill)
        if self.options.embed_bits:
            self.whole.round_ends(Packing(untouched(self.common), {}, self.checkpoint))
            self.decide.begin()
            self.report.begin()
        store = Store(folder if memory.variants_on_disk else None)
        self.variants = Variants(store, self.costs, self.whole)
        self.judge = Judge(self.space, self.variants)

    def measure(self, on_progress: OnProgress) -> Sensitivities:
        """The walk: all variants and their KLs. It serves any number of budgets."""
        walk = Walk(
            self.whole,
            self.costs,
            self.space.units,
            self.hessian,
            self.decide,
            self.variants,
            self.streams,
            parts=self.parts,
            drop=self.options.drop,
            seconds=self.seconds,
            on_progress=on_progress,
        )
        self.made = walk.total
        return walk.go()

    def go(self, texts: Any, place: torch.device, folder: Path, on_progress: OnProgress) -> Found:
        """All of it, from texts to the table."""
        self.open(texts, place, folder)
        dense = next(filter(None, (self.space.uniform(c) for c in self.choices if c.dense)), None)
        if dense is not None and dense.bytes <= self.budget:
            self._notice("the budget holds the model as it is, so nothing has to be compressed")
            return self._found(dense, None, (0.0, True, 0))
        return self.find(self.measure(on_progress), self.budget, on_progress)

    def find(self, found: Sensitivities, budget: int, on_progress: OnProgress) -> Found:
        """The best candidate of a budget."""
        self.budget = budget
        candidate, exact = self._allocate(found)
        candidate, decided, accepted = self._polish(found, candidate, on_progress)
        return self._found(candidate, found, (decided, exact, accepted))

    def _tell_few(self, sets: Sets) -> None:
        if sets.windows_per_language < 2:
            self._notice(
                "one window per language decides; more search tokens would tell languages apart "
                "better"
            )

    def _notice(self, message: str) -> None:
        self.notices.append(message)
        self.on_event(events.Notice(message))

    def _allocate(self, found: Sensitivities) -> tuple[Candidate, bool]:
        start, told = time.perf_counter(), None
        if team().first:
            units, base, dropped = self.space.tables(found)
            room = self.budget - self.space.fixed
            _, best = best_allocation(units, base, dropped, room, self.alpha)
            told = (best.picks, best.exact)
        picks, exact = team().tell(told)
        self.seconds.since("allocate", start)
        return self.space.from_parts(picks), exact

    def _polish(
        self, found: Sensitivities, candidate: Candidate, on_progress: OnProgress
    ) -> tuple[Candidate, float, int]:
        """The candidate after the swaps asked for, its objective where it was decided, and how many
        swaps were taken.
        """
        start = time.perf_counter()
        kl = self.judge.languages(candidate, self.decide)
        start, accepted = self.seconds.since("verify", start), 0
        if self.options.polish:
            steps, seed = self.options.polish, self.options.calibration.seed

            def polished(judge: Measure) -> tuple[Candidate, np.ndarray, int]:
                return polish(
                    self.space, found, candidate, kl, self.budget, self.alpha, steps, seed, judge,
                    lambda done, of, best: on_progress(done, of, f"swaps, objective {best:.4f}"),
                )  # fmt: skip

            candidate, kl, accepted = polish_together(
                self.space, lambda other: self.judge.languages(other, self.decide), polished
            )
            self.seconds.since("polish", start)
        return candidate, weighted(kl, self.alpha), accepted

    def _rows(self, candidate: Candidate) -> list[Row]:
        """The recipe first, then every uniform choice that all matrices can have, largest first."""
        start = time.perf_counter()
        rows = [self._row("recipe", candidate, searched=True)]
        for choice in self.choices:
            if not self.made and not choice.dense:  # nothing had to be compressed
                continue
            uniform = self.space.uniform(choice)
            if uniform is None:
                self._notice(f"{choice.name} does not fit every matrix, so no row has it alone")
                continue
            same = same_size(self.space.file_bytes(uniform), rows[0].bytes)
            rows.append(self._row(choice.name, uniform, same_size=same))
        self.seconds.since("verify", start)
        return [rows[0], *sorted(rows[1:], key=lambda r: -r.bytes)]

    def _row(self, name: str, candidate: Candidate, **marks: bool) -> Row:
        sizes = (self.space.file_bytes(candidate), self.space.bits_per_weight(candidate))
        if candidate not in self._measured:
            self._measured[candidate] = self.judge(candidate, self.report)
        kl, report = self._measured[candidate], self.report
        return row(name, sizes, kl, report.of_window, report.languages, self.alpha, **marks)

    # ---- what it found ----

    def _found(
        self,
        candidate: Candidate,
        found: Sensitivities | None,
        decided: tuple[float, bool, int],
    ) -> Found:
        space, rows = self.space, self._rows(candidate)
        predicted = space.predicted(found, candidate) if found is not None else np.zeros(1)
        seconds = {"seconds": time.perf_counter() - self.start, **asdict(self.seconds)}
        return Found(
            recipe=to_recipe(space, candidate, self.common),
            rows=rows,
            budget={
                "of": "weight files" if space.whole_files else "linears",
                "bytes": self.budget,
                "used_bytes": candidate.bytes,
                "embedding_and_rest_bytes": space.file_bytes(candidate)
                - space.linear_bytes(candidate),
            },
            alpha=self.alpha,
            predicted=weighted(predicted, self.alpha),
            decided=decided[0],
            exact=decided[1],
            accepted=decided[2],
            allocation={
                name: unit.choices[pick].name
                for unit, pick in zip(space.units, candidate.picks, strict=True)
                if unit.layer not in candidate.dropped
                for name in unit.names
            },
            dropped=sorted(candidate.dropped),
            cost=team().tell(
                {"variants": self.made, **{k: round(v, 3) for k, v in seconds.items()}}
            ),
            notices=self.notices,
        )
