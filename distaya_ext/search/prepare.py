"""What a search needs before it starts: windows for three purposes, units, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..compress.budget import GIB, activation_bytes, physical_bytes, working_bytes
from ..compress.calibrate import load_calibration
from ..errors import InputError, ResourceError
from ..ranks import team
from ..recipe import Recipe, parse_size
from .choices import Costs
from .options import Options
from .sensitivity import Unit
from .whole import CHUNK_BYTES, KEPT_BYTES, run_dtype

_SHORTEST = 32  # tokens of a window that is measured on, unless the calibration's are shorter

Labelled = tuple[torch.Tensor, list[str]]  # ids int64 [N, length], language of each


@dataclass(frozen=True)
class Sets:
    """Disjoint windows: for Hessians, for what decides, for what the table reports."""

    hessian: torch.Tensor
    decide: Labelled
    report: Labelled

    @property
    def windows_per_language(self) -> int:
        """Of those that decide."""
        return len(self.decide[1]) // len(set(self.decide[1]))


def cut(texts: Any, options: Options, checkpoint: Checkpoint) -> Sets:
    """The three sets of windows, on every rank as rank 0 cuts them; errors as in cut_here."""
    us = team()
    own = cut_here(texts, options, checkpoint) if us.first else None
    if us.alone:
        return own
    sets = own and [(own.hessian, []), own.decide, own.report]
    languages = us.tell(sets and [of_set for _, of_set in sets])
    hessian, decide, report = (us.from_first(sets and sets[i][0]) for i in range(3))
    return Sets(hessian, (decide, languages[1]), (report, languages[2]))


def cut_here(texts: Any, options: Options, checkpoint: Checkpoint) -> Sets:
    """The three sets out of one cut of the texts, each balanced over the languages.

    Where texts are short the search gets at most half of the windows; where search_tokens are fewer
    than a window per language and purpose, the beginnings of windows do. InputError for fewer than
    three windows in a language.
    """
    spec = options.calibration
    more = spec.model_copy(update={"tokens": spec.tokens + options.search_tokens})
    asked = Recipe(model=str(checkpoint.folder), method="gptq", bits=4, calibration=more)
    found = load_calibration(texts, asked, checkpoint)
    of: dict[str, list[int]] = {}
    for i, lang in enumerate(found.languages):
        of.setdefault(lang, []).append(i)
    least, where = min((len(rows), lang) for lang, rows in of.items())
    if least < 3:
        raise InputError(
            f"the texts give {least} windows in {where}; a search needs 3 in every language, for "
            "the Hessians, for what decides and for what is reported"
        )
    each = options.search_tokens // (2 * len(of))  # tokens per language, per purpose
    length = min(found.ids.shape[1], max(_SHORTEST, each))
    count = max(1, min(each // length, least // 4))

    def take(start: int | None, stop: int | None) -> Labelled:
        rows = sorted(i for rows in of.values() for i in rows[start:stop])
        return found.ids[rows].contiguous(), [found.languages[i] for i in rows]

    decide, report = take(-2 * count, -count), take(-count, None)
    return Sets(
        take(None, -2 * count)[0],
        (decide[0][:, :length].contiguous(), decide[1]),
        (report[0][:, :length].contiguous(), report[1]),
    )


def make_units(costs: Costs, per: str) -> list[Unit]:
    """Units in the order of layers and stages, with the choices that fit all their matrices.

    InputError for a unit that no choice fits.
    """
    architecture = costs.checkpoint.architecture
    units = []
    for layer in range(costs.checkpoint.config.num_hidden_layers):
        prefix = f"{architecture.layers}.{layer}"
        for stage in architecture.stages:
            names = tuple(f"{prefix}.{name}" for name in stage.names)
            for group in [names] if per == "stage" else [(name,) for name in names]:
                fit = tuple(
                    choice
                    for choice in costs.choices
                    if all(costs.fits(name, choice) for name in group)
                )
                if not fit:
                    raise InputError(
                        f"none of the choices fits {group[0]}, which has "
                        f"{costs.shape(group[0])[1]} inputs"
                    )
                units.append(Unit(layer, group, fit))
    return units


@dataclass(frozen=True)
class Memory:
    """Whether hidden states and variants lie on disk."""

    spills: bool
    variants_on_disk: bool


def plan_memory(
    checkpoint: Checkpoint,
    costs: Costs,
    sets: Sets,
    limit: str | None,
    place: torch.device,
    parts: int = 1,
) -> Memory:
    """What fits where, which no other rank has to know. ResourceError when the model itself has no
    room beside its work. limit: of each process; without one those of a host share its memory.
    parts: of the Hessians that this rank sums.
    """
    us = team()
    itemsize = run_dtype(checkpoint).itemsize
    model = sum(e.nbytes // e.dtype.itemsize for e in checkpoint.entries.values()) * itemsize
    window = 12 * sets.hessian.shape[1] * checkpoint.config.vocab_size
    least = model + working_bytes(checkpoint) + max(3 * CHUNK_BYTES, window)
    if parts > 1:  # sums of those before the one at work, see ranks.sums
        least += (parts - 1).bit_length() * _moments_bytes(checkpoint, costs)
    have = parse_size(limit) if limit is not None else physical_bytes() // us.local_world
    if place.type == "cuda":
        _check(least, torch.cuda.mem_get_info(place)[0], f"on {place}")
    _check(least, have, "in memory")
    tokens = sets.hessian.numel() // us.world + sets.decide[0].numel() + sets.report[0].numel()
    waiting = 3 * activation_bytes(checkpoint, tokens) + KEPT_BYTES
    packed = [choice for choice in costs.choices if not choice.dense]
    weights = sum(rows * columns for rows, columns in map(costs.shape, costs.names))
    room = have - least
    # A rank keeps its share of all variants, and what the candidates that decide are made of.
    kept = len(packed) if us.alone else len(packed) / us.world + 1
    return Memory(waiting > room // 2, kept * weights * 9 // 8 > room // 4)


def _moments_bytes(checkpoint: Checkpoint, costs: Costs) -> int:
    """The Hessians of all stages of a layer."""
    architecture = checkpoint.architecture
    first = [f"{architecture.layers}.0.{stage.names[0]}" for stage in architecture.stages]
    return 4 * sum(costs.shape(name)[1] ** 2 for name in first)


def _check(needed: int, have: int, where: str) -> None:
    if needed > have:
        raise ResourceError(
            f"the search holds the whole model {where}: it needs {needed / GIB:.2f} GiB and has "
            f"{have / GIB:.2f} GiB"
        )
