"""Scoring the layers of a model, and choosing which ones it can best do without."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..compress.calibrate import Calibration, load_calibration
from ..compress.shared import shared_calibration
from ..device import find_device
from ..errors import UsageError
from ..models.depth import irregular
from ..recipe import CalibrationSpec, Recipe
from .scores import REMOVAL, Languages, Loss, Scores, loss_of, scores_of
from .spec import SCORES, DropSpec
from .walk import Walk

OnEvent = Callable[[Any], None]


@dataclass(frozen=True)
class Round:
    """Layers (of the source) that went in one round, and the scores they were chosen by."""

    went: tuple[int, ...]
    scores: Scores


@dataclass(frozen=True)
class Choice:
    """Layers to drop, sorted, why, and what it costs.

    scores are those of the whole model, rounds all that were measured: one but for greedy choices.
    """

    dropped: list[int]
    spec: DropSpec
    rounds: tuple[Round, ...]
    loss: Loss
    notices: list[str] = field(default_factory=list)

    @property
    def scores(self) -> Scores:
        return self.rounds[0].scores

    def to_dict(self) -> dict[str, Any]:
        """For JSON and reports."""
        return {
            "dropped": self.dropped,
            "score": self.spec.score,
            "greedy": self.spec.greedy and self.spec.score in REMOVAL,
            "rounds": [list(one.went) for one in self.rounds],
            "loss": self.loss.to_dict(),
            "notices": self.notices,
        }


def score_layers(
    checkpoint: Checkpoint,
    windows: Any,
    scores: Sequence[str] = SCORES,
    *,
    run: int = 1,
    parts: bool = False,
    device: str | torch.device = "cpu",
    on_event: OnEvent | None = None,
    scratch: Path | None = None,
    max_ram: int | None = None,
) -> Scores:
    """How much every layer does, in one walk with one layer in memory at a time.

    windows  ids int64 [windows, length] and languages, as texts.windows returns them
    run      also the angular distance over runs of so many consecutive layers
    parts    also attention and MLP of each layer by themselves
    on_event gets influence.events.Measured
    scratch  where hidden states lie that memory has no room for (max_ram bytes; None: a quarter)

    Raises UsageError for unknown scores and runs longer than the model, InputError for windows that
    do not fit the model and where numbers overflow.
    """
    study = Study(checkpoint, windows, scores, run=run, parts=parts)
    return study.go((), device=device, on_event=on_event, scratch=scratch, max_ram=max_ram)[0]


def choose(
    checkpoint: Checkpoint,
    windows: Any,
    spec: DropSpec,
    *,
    device: str | torch.device = "cpu",
    on_event: OnEvent | None = None,
    scratch: Path | None = None,
    max_ram: int | None = None,
) -> Choice:
    """The layers that a spec means for this model and these windows (see score_layers).

    kl and ppl drop the layer without which least is lost and, greedy, measure all others again on
    the model without it, until enough went (SLEB, Song et al. 2024; BlockPruner, Zhong et al.
    2024); angular drops the run of consecutive layers with the least distance over all tokens; bi
    and l2 the layers with the least. Of equal ones the first goes. Deterministic.

    Raises UsageError for a number of layers or a protected layer that the model has not.
    """
    count, _ = how_many(spec, checkpoint.config.num_hidden_layers)
    run = count if spec.score == "angular" else 1
    study = Study(checkpoint, windows, [spec.score], run=run)
    more = {"device": device, "on_event": on_event, "scratch": scratch, "max_ram": max_ram}
    return study.go([spec], **more)[1][0]


class Study:
    """Scores of a model's layers, and choices by several of them, in walks they share."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Any,
        scores: Sequence[str] = SCORES,
        *,
        run: int = 1,
        parts: bool = False,
    ):
        self.checkpoint, self.depth = checkpoint, checkpoint.config.num_hidden_layers
        self.asked = check_scores(scores)
        if not 1 <= run <= self.depth:
            raise UsageError(f"a run of {run} layers is asked for; the model has {self.depth}")
        self.run, self.parts = run, parts
        self.windows = given(windows, checkpoint)
        self.languages = Languages(self.windows.languages, self.windows.ids.shape[1])
        self.removal = bool(set(self.asked) & set(REMOVAL))
        self._walk: Walk | None = None
        self._swept: dict[tuple[int, ...], Scores] = {}
        self._lost: dict[tuple[int, ...], Loss] = {}

    def go(
        self,
        specs: Sequence[DropSpec],
        *,
        device: str | torch.device = "cpu",
        on_event: OnEvent | None = None,
        scratch: Path | None = None,
        max_ram: int | None = None,
    ) -> tuple[Scores, list[Choice]]:
        """Scores of the whole model and a choice for each spec, whose scores must be among those
        asked for and whose runs (angular) as long as the study's.
        """
        counts = [how_many(spec, self.depth) for spec in specs]
        candidates = self.depth * (1 + 2 * self.parts) * self.removal
        place = find_device(str(device), kernels=True)
        with Walk(
            self.checkpoint,
            self.windows,
            streams=1 + candidates + self.run * (self.run > 1),
            device=place,
            scratch=scratch,
            max_ram=max_ram,
            on_event=on_event,
        ) as self._walk:
            scores = self._scores(self._walk.layers, "")
            choices = [self._choice(spec, *how) for spec, how in zip(specs, counts, strict=True)]
        return scores, choices

    def _scores(self, left: tuple[int, ...], what: str) -> Scores:
        """Of the model of these layers, measured once."""
        if left not in self._swept:
            whole = len(left) == self.depth
            sweep = self._walk.sweep(
                left,
                removal=self.removal,
                parts=self.parts and whole,
                run=self.run if whole else 1,
                what=what,
            )
            asked = self.asked if whole else [s for s in self.asked if s in REMOVAL]
            self._swept[left] = scores_of(sweep, self.languages, asked, self.run)
            if self.removal and not whole:
                self._lost[left] = loss_of(sweep.base, self.languages)
        return self._swept[left]

    def _loss(self, left: tuple[int, ...]) -> Loss:
        if left not in self._lost:
            sweep = self._walk.sweep(left, removal=False, what="without them, ")
            self._lost[left] = loss_of(sweep.base, self.languages)
        return self._lost[left]

    def _choice(self, spec: DropSpec, count: int, free: list[int]) -> Choice:
        rounds: list[Round] = []
        left = self._walk.layers
        greedy = spec.greedy and spec.score in REMOVAL
        step = 1 if greedy else count
        while self.depth - len(left) < count:
            what = f"{spec.score} round {len(rounds) + 1} of {count}, " if greedy else ""
            scores = self._scores(left, what)
            if spec.score == "angular" and count > 1:
                went = _least_run(scores, free)
            else:
                allowed = [layer for layer in scores.ranking(spec.score) if layer in free]
                went = tuple(sorted(allowed[:step]))
            rounds.append(Round(went, scores))
            left = tuple(layer for layer in left if layer not in went)
        dropped = [layer for layer in self._walk.layers if layer not in left]
        notice = irregular(self.checkpoint.config, left)
        notices = [] if notice is None else [notice]
        return Choice(dropped, spec, tuple(rounds), self._loss(left), notices)


def how_many(spec: DropSpec, depth: int) -> tuple[int, list[int]]:
    """How many layers of `depth` go, and which ones may. UsageError when that is none or all, or
    when too few are not protected.
    """
    kept = set()
    for index in spec.protect:
        if not -depth <= index < depth:
            raise UsageError(
                f"protect names layer {index}; the model has {depth}, from 0 to {depth - 1} or, "
                f"counted from the end, from -{depth} to -1"
            )
        kept.add(index % depth)
    count = spec.count
    if count is None:
        part = Fraction(str(spec.share))  # as it was written: 0.29 of 100 layers are 29
        count = math.floor(part * depth)
        if not count:
            raise UsageError(f"{float(100 * part):g}% of {depth} layers is less than one layer")
    if count >= depth:
        raise UsageError(
            f"dropping {count} layers is asked for; the model has {depth} and must keep at least 1"
        )
    free = [layer for layer in range(depth) if layer not in kept]
    if count > len(free):
        raise UsageError(
            f"dropping {count} layers is asked for; of {depth} layers {len(kept)} are protected, "
            f"so only {len(free)} may go"
        )
    return count, free


def check_scores(scores: Sequence[str]) -> list[str]:
    """The scores in the order they are shown. UsageError for one that is not known and for none."""
    for score in scores:
        if score not in SCORES:
            raise UsageError(f"score {score!r} is none of {', '.join(SCORES)}")
    if not scores:
        raise UsageError(f"no score is asked for; choose among {', '.join(SCORES)}")
    return [score for score in SCORES if score in scores]


def given(windows: Any, checkpoint: Checkpoint, spec: CalibrationSpec | None = None) -> Calibration:
    """Token windows (or those of a folder of texts, cut as spec says), checked against a model.
    Under ranks windows must be the same on all, and a folder is read by rank 0, for all that call.
    """
    wanted = {} if spec is None else {"calibration": spec}
    asked = Recipe(model=str(checkpoint.folder), method="gptq", bits=4, **wanted)
    read = shared_calibration if isinstance(windows, (str, Path)) else load_calibration
    return read(windows, asked, checkpoint)


def _least_run(scores: Scores, free: list[int]) -> tuple[int, ...]:
    """The run of least angular distance, all of whose layers may go."""
    runs = {first: range(first, first + scores.run) for first in scores.firsts}
    able = [i for i, first in enumerate(scores.firsts) if set(runs[first]) <= set(free)]
    if not able:
        raise UsageError(
            f"no {scores.run} consecutive layers are all free to go; {len(free)} of "
            f"{len(scores.candidates)} are not protected"
        )
    mean = scores.runs.mean(axis=1)
    return tuple(runs[scores.firsts[min(able, key=lambda i: (mean[i], i))]])
