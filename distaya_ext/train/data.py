"""What a model learns from: windows of text in many languages, or chats, and what is held out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..documents import open_texts
from ..errors import InputError
from ..texts import windows
from ..tokenizer import check_rows
from .chat import Chats, chat_files, read_chats
from .objective import Batch
from .spec import TrainSpec

IGNORED = -100  # label of a token that nothing is to be learnt from

Texts = str | os.PathLike | Mapping[str, Iterable[str]]


@dataclass(frozen=True)
class TrainingData:
    """Rows to learn from, or to measure on.

    ids, labels  int64 [N, L]; label t is the token at t itself (not yet shifted) or -100
    mask         bool [N, L]; False is padding, on the right
    languages    of each row
    first        number of row 0; held-out rows count on from the training ones
    notes        what was left out or cut short on the way, in sentences
    """

    ids: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    languages: list[str]
    first: int = 0
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.ids.shape != self.labels.shape or self.ids.shape != self.mask.shape:
            shapes = [list(part.shape) for part in (self.ids, self.labels, self.mask)]
            raise ValueError(f"ids, labels and mask differ in shape: {shapes}")
        if len(self.languages) != len(self.ids):
            raise ValueError(f"{len(self.ids)} rows and {len(self.languages)} languages")

    @classmethod
    def of_windows(
        cls, ids: torch.Tensor, languages: list[str] | None = None, first: int = 0
    ) -> TrainingData:
        """Rows of windows without padding, int64 [N, L], every token of which is learnt."""
        mask = torch.ones_like(ids, dtype=torch.bool)
        return cls(ids, ids.clone(), mask, languages or ["und"] * len(ids), first)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def window(self) -> int:
        """L, tokens per row."""
        return self.ids.shape[1]

    @property
    def labelled(self) -> int:
        """Tokens that are learnt: the first of a row is predicted from nothing."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    @property
    def tokens_per_language(self) -> dict[str, int]:
        """Tokens without padding."""
        counts = self.mask.sum(dim=1).tolist()
        found = dict.fromkeys(self.languages, 0)
        for lang, count in zip(self.languages, counts, strict=True):
            found[lang] += count
        return found

    def batch(self, rows: Iterable[int], device: torch.device | str = "cpu") -> Batch:
        """These rows (numbers from 0 in this data), cut behind their longest."""
        index = torch.as_tensor(list(rows))
        mask = self.mask[index]
        length = max(1, int(mask.sum(dim=1).max()))
        parts = (self.ids[index], self.labels[index], mask)
        ids, labels, mask = (part[:, :length].to(device) for part in parts)
        return Batch(ids, labels, mask, (index + self.first).to(device))

    def take(self, rows: torch.Tensor, first: int = 0) -> TrainingData:
        """These rows alone."""
        languages = [self.languages[i] for i in rows.tolist()]
        parts = (self.ids[rows], self.labels[rows], self.mask[rows])
        return TrainingData(*parts, languages, first, self.notes)

    def digest(self) -> str:
        """SHA-256 of all rows, in hexadecimal digits."""
        found = hashlib.sha256(repr([list(self.ids.shape), self.first, self.languages]).encode())
        for part in (self.ids, self.labels, self.mask):
            found.update(part.contiguous().numpy())
        return found.hexdigest()


def labelled(data: TrainingData, rows: list[int] | None = None) -> list[int]:
    """Those of the rows (None: all) that have something to learn. InputError where none of all has,
    and nothing is to be learnt at all.
    """
    labels = data.labels[:, 1:] if rows is None else data.labels[rows][:, 1:]
    found = (labels != IGNORED).any(dim=1).nonzero()[:, 0].tolist()
    if rows is None and not found:
        raise InputError(f"none of {len(data)} windows has a label to learn from")
    return found if rows is None else [rows[i] for i in found]


def from_texts(
    texts: Texts, tokenizer: Any, spec: TrainSpec, *, vocabulary: int | None = None
) -> tuple[TrainingData, TrainingData | None]:
    """(training, held-out) rows; no held-out ones where spec.held_out is 0.

    texts  a folder of <lang>.txt, .jsonl or .parquet (see documents), documents by language, or
           chats: a .jsonl file, or a folder of <lang>.jsonl, whose lines are objects with
           "messages": [{"role": ..., "content": ...}, ...], of which only what the assistant says
           is learnt
    vocabulary  rows of the embedding; tokens beyond it are refused

    Text is cut into windows of spec.window tokens, as many in every language out of spec.tokens
    (None: all there is, however much a language has), or by spec.quotas. A share spec.held_out of
    each language's rows, chosen by spec.seed, at least one, is held out. InputError in one
    sentence for what cannot be used.
    """
    chats = chat_files(texts)
    rows = _from_chats(read_chats(chats, tokenizer, spec.window), spec) if chats else None
    data = rows or _from_windows(texts, tokenizer, spec)
    if vocabulary is not None:
        check_rows(int(data.ids.max()), vocabulary, "the texts hold token")
        check_rows(int(data.ids.min()), vocabulary, "the texts hold token")
    return _split(data, spec)


def _from_windows(texts: Texts, tokenizer: Any, spec: TrainSpec) -> TrainingData:
    by_language: Mapping[str, Iterable[str]] = (
        texts if isinstance(texts, Mapping) else open_texts(texts)
    )
    settings: dict[str, Any] = {"window": spec.window, "seed": spec.seed}
    if spec.tokens is None and spec.quotas is None and by_language:
        each = [
            windows({lang: documents}, tokenizer, tokens=None, **settings)
            for lang, documents in by_language.items()
        ]
        ids = torch.cat([found.ids for found in each])
        return TrainingData.of_windows(ids, [lang for found in each for lang in found.languages])
    found = windows(by_language, tokenizer, tokens=spec.tokens, quotas=spec.quotas, **settings)
    data = TrainingData.of_windows(found.ids, found.languages)
    if found.limited_by is not None:
        data.notes.append(
            f"{found.limited_by} has text for {found.per_language} windows only, so every language "
            "without a quota gives as many"
        )
    return data


def _from_chats(chats: Chats, spec: TrainSpec) -> TrainingData:
    """Chats as padded rows, so many of every language that its share of spec.tokens is reached."""
    chosen = list(range(len(chats.ids)))
    if spec.tokens is not None or spec.quotas is not None:
        chosen = _balanced(chats, spec)
    length = max(len(chats.ids[i]) for i in chosen)
    ids = torch.zeros(len(chosen), length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, i in enumerate(chosen):
        here = slice(0, len(chats.ids[i]))
        ids[row, here] = torch.tensor(chats.ids[i])
        learnt = torch.tensor(chats.learnt[i])
        labels[row, here] = torch.where(learnt, ids[row, here], IGNORED)
        mask[row, here] = True
    return TrainingData(ids, labels, mask, [chats.languages[i] for i in chosen], 0, chats.notes)


def _balanced(chats: Chats, spec: TrainSpec) -> list[int]:
    """Rows of a seeded choice: of each language until its quota or equal share is reached."""
    languages = sorted(set(chats.languages))
    quotas = dict(spec.quotas or {})
    strange = sorted(set(quotas) - set(languages))
    if strange:
        raise InputError(
            f"there is a quota for {', '.join(strange)}, but the chats are in "
            f"{', '.join(languages)}"
        )
    others = len(languages) - len(quotas)
    rest = 0 if spec.tokens is None else max(0, spec.tokens - sum(quotas.values()))
    share = rest // others if others else 0
    taken: list[int] = []
    for lang in languages:
        rows = [i for i, found in enumerate(chats.languages) if found == lang]
        room = quotas.get(lang, share)
        for i in _rng(spec.seed, lang, 2).permutation(rows).tolist():
            if len(chats.ids[i]) <= room:
                taken.append(i)
                room -= len(chats.ids[i])
    if not taken:
        raise InputError(
            f"{spec.tokens} tokens are fewer than the shortest of {len(chats.ids)} chats in any of "
            f"{len(languages)} languages"
        )
    return sorted(taken)


def _split(data: TrainingData, spec: TrainSpec) -> tuple[TrainingData, TrainingData | None]:
    """A share of each language's rows apart, at least one of them and never all."""
    if len(data) < 2:
        raise InputError(
            f"the texts give {len(data)} row of up to {spec.window} tokens; training needs at "
            "least 2, so give more text or a smaller window"
        )
    if not spec.held_out:
        return data, None
    held: list[int] = []
    for lang in sorted(set(data.languages)):
        rows = [i for i, found in enumerate(data.languages) if found == lang]
        if len(rows) < 2:
            raise InputError(
                f"{lang} has one row of up to {spec.window} tokens, which cannot be split into "
                f"training and held-out text ({spec.held_out:g} of each language); give more text, "
                "a smaller window, or held_out 0"
            )
        count = min(len(rows) - 1, max(1, round(spec.held_out * len(rows))))
        held += _rng(spec.seed, lang, 3).choice(rows, size=count, replace=False).tolist()
    apart = torch.zeros(len(data), dtype=torch.bool)
    apart[held] = True
    keep, out = (~apart).nonzero()[:, 0], apart.nonzero()[:, 0]
    return data.take(keep), data.take(out, first=len(keep))


def _rng(seed: int, lang: str, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, *lang.encode()])
