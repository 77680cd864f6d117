"""Scores of layers per language, out of the sums a walk took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from .candidate import Candidate
from .walk import Sweep

SIMILARITY = ("bi", "angular", "l2")  # columns of ops.influence.similarity
REMOVAL = ("ppl", "kl")
MEANING = {
    "bi": "block influence, 1 - cos(input, output)",
    "angular": "angle between input and output / pi",
    "l2": "|output - input| / |input|",
    "ppl": "delta NLL without it, nats per token",
    "kl": "KL(dense || without it), nats per token",
}


class Languages:
    """Which window is in which language; sums over windows become means per language."""

    def __init__(self, of_window: Sequence[str], length: int):
        self.names = tuple(sorted(set(of_window)))
        self._place = np.array([self.names.index(lang) for lang in of_window])
        self.length = length
        counted = Counter(of_window)
        self.windows = {lang: counted[lang] for lang in self.names}

    def mean(self, sums: np.ndarray, per_window: int) -> np.ndarray:
        """Means over the tokens of each language, float64 [languages], of sums [windows] over
        per_window tokens each.
        """
        totals = np.bincount(self._place, weights=sums, minlength=len(self.names))
        return totals / (per_window * np.array(list(self.windows.values())))


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
class Scores:
    """What each candidate does, per language; small is little.

    tables[score]  float64 [candidates, languages], means over tokens: bi, angular and l2 over all
                   tokens of the windows, ppl (delta NLL) and kl over the predicted ones; "angular
                   last" is that of the last token of each window (Gromov et al. 2024)
    run, firsts    runs of `run` consecutive layers, by the layer they begin with
    runs           angular distance [firsts, languages] over all tokens, runs_last of last tokens
    nll            dense model's NLL per token [languages], where removal was measured

    bi is ShortGPT's block influence (Men et al. 2024, arXiv 2403.03853); a part's is that between
    the layer's outputs without and with it.
    """

    candidates: tuple[Candidate, ...]
    languages: Languages
    tables: Mapping[str, np.ndarray]
    run: int = 1
    firsts: tuple[int, ...] = ()
    runs: np.ndarray | None = None
    runs_last: np.ndarray | None = None
    nll: np.ndarray | None = None

    def mean(self, score: str) -> np.ndarray:
        """Per candidate, every language counting the same: float64 [candidates]."""
        return self.tables[score].mean(axis=1)

    def worst(self, score: str, candidate: int) -> tuple[str, float]:
        """The language in which a candidate (its place in the list) does most, and how much."""
        row = self.tables[score][candidate]
        at = int(row.argmax())
        return self.languages.names[at], float(row[at])

    def ranking(self, score: str, kind: str = "layer") -> list[int]:
        """Layers by what they do, the least first; of equal ones the first in the model."""
        mean = self.mean(score)
        rows = [i for i, who in enumerate(self.candidates) if who.kind == kind]
        return [self.candidates[i].layer for i in sorted(rows, key=lambda i: (mean[i], i))]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: lists by candidate, dicts by language."""
        names = self.languages.names

        def rows(table: np.ndarray) -> list[dict[str, float]]:
            return [dict(zip(names, map(float, row), strict=True)) for row in table]

        found: dict[str, Any] = {
            "candidates": [str(who) for who in self.candidates],
            "windows": dict(self.languages.windows),
            "window": self.languages.length,
            "scores": {
                score: {"mean": [float(m) for m in self.mean(score)], "languages": rows(table)}
                for score, table in self.tables.items()
            },
        }
        if self.runs is not None:
            found["runs"] = {
                "layers": self.run,
                "first": list(self.firsts),
                "angular": [float(m) for m in self.runs.mean(axis=1)],
                "angular last": [float(m) for m in self.runs_last.mean(axis=1)],
                "languages": rows(self.runs),
            }
        if self.nll is not None:
            found["nll"] = dict(zip(names, map(float, self.nll), strict=True))
        return found


def scores_of(sweep: Sweep, languages: Languages, asked: Sequence[str], run: int) -> Scores:
    """Divide what was summed. InputError for a score that is not finite."""
    everyone = tuple(sorted(sweep.near, key=lambda who: who.kind != "layer"))  # layers first
    length = languages.length
    tables: dict[str, np.ndarray] = {}

    def table(score: str, sums: Mapping[Any, np.ndarray], per_window: int) -> None:
        tables[score] = np.stack([languages.mean(sums[who], per_window) for who in everyone])
        bad = ~np.isfinite(tables[score])
        if bad.any():
            who, lang = (int(i[0]) for i in bad.nonzero())
            raise InputError(
                f"the {score} score of {everyone[who]} is not finite in {languages.names[lang]}; "
                "the model overflows there"
            )

    for column, score in enumerate(SIMILARITY):
        if score in asked:
            table(score, {who: s[:, column] for who, s in sweep.near.items()}, length)
    if "angular" in asked:
        table("angular last", {who: s[:, 1] for who, s in sweep.last.items()}, 1)
    if sweep.lost and "ppl" in asked:
        table("ppl", {who: s[:, 2] - s[:, 1] for who, s in sweep.lost.items()}, length - 1)
    if sweep.lost and "kl" in asked:
        table("kl", {who: s[:, 0] for who, s in sweep.lost.items()}, length - 1)
    firsts = tuple(sorted(sweep.runs))
    runs = [
        [languages.mean(sweep.runs[f][i][:, 1], n) for f in firsts]
        for i, n in ((0, length), (1, 1))
    ]
    nll = None if sweep.base is None else languages.mean(sweep.base[:, 1], length - 1)
    if not firsts:
        return Scores(everyone, languages, tables, nll=nll)
    return Scores(everyone, languages, tables, run, firsts, *map(np.stack, runs), nll)


def loss_of(base: np.ndarray, languages: Languages) -> Loss:
    """From a sweep's sums of the model it walked."""
    per_window = languages.length - 1
    kl = languages.mean(base[:, 0], per_window)
    return Loss(languages.names, kl, languages.mean(base[:, 2] - base[:, 1], per_window))
