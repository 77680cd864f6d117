"""Scoring the layers of a model, and choosing which ones it can best do without."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint import Checkpoint
from ..compress.calibrate import Calibration, load_calibration
from ..errors import UsageError
from ..models.depth import irregular
from ..recipe import CalibrationSpec, Recipe
from .scores import REMOVAL, Languages, Scores, scores_of
from .spec import SCORES, DropSpec
from .walk import Walk

OnEvent = Callable[[Any], None]


@dataclass(frozen=True)
class Loss:
    """What a model without some layers loses against the whole one, per language.

    kl and dnll float64 [languages], nats per predicted token.
    """

    languages: tuple[str, ...]
    kl: np.ndarray
    dnll: np.ndarray

    @property
    def worst(self) -> tuple[str, float]:
        """The language whose NLL grows most, and by how much."""
        at = int(self.dnll.argmax())
        return self.languages[at], float(self.dnll[at])

    def to_dict(self) -> dict[str, Any]:
        by_language = {
            lang: {"kl": float(kl), "dnll": float(dnll)}
            for lang, kl, dnll in zip(self.languages, self.kl, self.dnll, strict=True)
        }
        return {
            "kl": float(self.kl.mean()), "dnll": float(self.dnll.mean()),
            "worst": self.worst[0], "languages": by_language,
        }  # fmt: skip


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
    asked = check_scores(scores)
    depth = checkpoint.config.num_hidden_layers
    if not 1 <= run <= depth:
        raise UsageError(f"a run of {run} layers is asked for; the model has {depth}")
    windows = given(windows, checkpoint)
    removal = bool(set(asked) & set(REMOVAL))
    streams = streams_of(depth, removal, parts, run)
    with Walk(
        checkpoint, windows, streams=streams, device=torch.device(device), scratch=scratch,
        max_ram=max_ram, on_event=on_event,
    ) as walk:  # fmt: skip
        sweep = walk.sweep(removal=removal, parts=parts, run=run)
    return scores_of(sweep, Languages(windows.languages, windows.ids.shape[1]), asked, run)


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
    count, free = how_many(spec, checkpoint.config.num_hidden_layers)
    windows = given(windows, checkpoint)
    languages = Languages(windows.languages, windows.ids.shape[1])
    removal = spec.score in REMOVAL
    run = count if spec.score == "angular" else 1
    streams = streams_of(checkpoint.config.num_hidden_layers, removal, False, run)
    with Walk(
        checkpoint, windows, streams=streams, device=torch.device(device), scratch=scratch,
        max_ram=max_ram, on_event=on_event,
    ) as walk:  # fmt: skip
        rounds = _rounds(walk, spec, count, free, languages, run)
        dropped = sorted(layer for one in rounds for layer in one.went)
        left = [layer for layer in walk.layers if layer not in dropped]
        base = walk.sweep(left, removal=False, what="without them, ").base
    loss = loss_of(base, languages)
    notice = irregular(checkpoint.config, left)
    return Choice(dropped, spec, tuple(rounds), loss, [] if notice is None else [notice])


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
    """Token windows (or those of a folder of texts, cut as spec says), checked against a model."""
    wanted = {} if spec is None else {"calibration": spec}
    asked = Recipe(model=str(checkpoint.folder), method="gptq", bits=4, **wanted)
    return load_calibration(windows, asked, checkpoint)


def streams_of(depth: int, removal: bool, parts: bool, run: int) -> int:
    """Hidden states of all tokens that wait at once: the model's, candidates', inputs of a run."""
    return 1 + depth * (1 + 2 * parts) * removal + run * (run > 1)


def loss_of(base: np.ndarray, languages: Languages) -> Loss:
    """From a sweep's sums of the model it walked."""
    per_window = languages.length - 1
    kl = languages.mean(base[:, 0], per_window)
    return Loss(languages.names, kl, languages.mean(base[:, 2] - base[:, 1], per_window))


def _rounds(
    walk: Walk, spec: DropSpec, count: int, free: list[int], languages: Languages, run: int
) -> list[Round]:
    """Rounds until `count` layers went."""
    removal = spec.score in REMOVAL
    rounds: list[Round] = []
    left = list(walk.layers)
    step = 1 if removal and spec.greedy else count
    while len(walk.layers) - len(left) < count:
        what = f"round {len(rounds) + 1} of {count}, " if step < count else ""
        sweep = walk.sweep(left, removal=removal, run=run, what=what)
        scores = scores_of(sweep, languages, [spec.score], run)
        if run > 1:
            went = _least_run(scores, free)
        else:
            allowed = [layer for layer in scores.ranking(spec.score) if layer in free]
            went = tuple(sorted(allowed[:step]))
        rounds.append(Round(went, scores))
        left = [layer for layer in left if layer not in went]
    return rounds


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
