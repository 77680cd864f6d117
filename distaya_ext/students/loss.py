"""Bits per byte of text before the first step of training, on the same pieces for every model.

A loss per token cannot be compared between tokenizers. Here the text is cut into pieces by
characters, the same for all; every token of a piece is scored behind a BOS (or EOS) alone, so the
sum over a piece is what the model needs to write that very text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..evaluate.load import Loaded
from ..evaluate.score import score
from ..evaluate.statistics import interval
from ..tokenizer import check_rows, encode, separator

PIECE = 512  # characters


@dataclass(frozen=True)
class Sample:
    """Text per language: pieces to score, lines to tokenise, and documents no piece is cut from."""

    pieces: dict[str, list[str]]
    lines: dict[str, list[str]]
    rest: dict[str, list[str]]


@dataclass(frozen=True)
class Loss:
    """Bits float64 [pieces] that a model needs for each piece of a language, and their bytes."""

    bits: dict[str, np.ndarray]
    bytes: dict[str, np.ndarray]

    @property
    def languages(self) -> dict[str, float]:
        """Bits per byte of each language."""
        return {lang: float(b.sum() / self.bytes[lang].sum()) for lang, b in self.bits.items()}

    @property
    def mean(self) -> float:
        """Mean over languages, each counting the same."""
        return float(np.mean(list(self.languages.values())))

    @property
    def worst(self) -> tuple[str, float]:
        """The language that needs most."""
        return max(self.languages.items(), key=lambda pair: (pair[1], pair[0]))

    def over(self, other: Loss) -> tuple[float, tuple[float, float] | None]:
        """mean - other.mean and its 95 % interval, by paired bootstrap over pieces."""
        sums, weights = [], []
        for lang, bits in self.bits.items():
            total = self.bytes[lang].sum()
            sums.append((bits - other.bits[lang]) / total)
            weights.append(self.bytes[lang] / total)
        return self.mean - other.mean, interval(np.concatenate(sums), np.concatenate(weights))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        each = self.languages
        lang, worst = self.worst
        return {"mean": self.mean, "worst_language": lang, "worst": worst, "languages": each}


def sample(
    texts: Mapping[str, Iterable[str]], characters: int, lines: int, piece: int = PIECE
) -> Sample:
    """The first `characters` of each language in pieces, and its first `lines` characters by line.

    Documents are taken in file order; a piece is at most `piece` characters of one document and
    ends behind white space where there is some in its second half.
    """
    pieces: dict[str, list[str]] = {}
    single: dict[str, list[str]] = {}
    rest: dict[str, list[str]] = {}
    for lang, documents in texts.items():
        scored = read = 0
        pieces[lang], single[lang], rest[lang] = [], [], []
        for document in documents:
            if scored < characters:
                found = cut(document[: characters - scored], piece)
                pieces[lang] += found
                scored += sum(map(len, found))
            else:
                rest[lang].append(document)
            if read < lines:
                here = document[: lines - read]
                single[lang] += [line for line in here.splitlines() if line.strip()]
                read += len(here)
        if not pieces[lang] or not single[lang]:
            raise InputError(f"the texts hold nothing to score in {lang}")
    return Sample(pieces, single, rest)


def cut(text: str, longest: int) -> list[str]:
    """Pieces of a text that give it again when joined, but for blank ones."""
    pieces = []
    while text:
        size = min(longest, len(text))
        if size < len(text):
            half = size // 2
            at = max((i for i in range(half, size) if text[i].isspace()), default=size - 1)
            size = at + 1
        pieces.append(text[:size])
        text = text[size:]
    return [piece for piece in pieces if piece.strip()]


def zero_step(
    loaded: Loaded,
    pieces: Mapping[str, Sequence[str]],
    *,
    device: str = "cpu",
    on_language: Callable[[str], None] | None = None,
) -> Loss:
    """What a model needs for the pieces. InputError where it cannot score them."""
    config = loaded.model.config
    mark = separator(loaded.tokenizer) or _marks(config)
    if not mark:
        raise InputError(
            f"{loaded.name} has neither a BOS nor an EOS token, so the first token of a text "
            "cannot be scored"
        )
    room = getattr(config, "max_position_embeddings", None)
    bits, sizes = {}, {}
    for lang, texts in pieces.items():
        ids = [mark + row for row in encode(loaded.tokenizer, list(texts))]
        longest, highest = max(map(len, ids)), max(max(row) for row in ids)
        if min(map(len, ids)) < 2:
            raise InputError(f"the tokenizer of {loaded.name} turns a piece of {lang} into nothing")
        check_rows(
            highest, loaded.vocabulary, f"{lang} has, in the tokenizer of {loaded.name}, token"
        )
        if room is not None and longest > room:
            raise InputError(
                f"{loaded.name} has {room} positions and a piece of {lang} has {longest} tokens"
            )
        rows = [torch.tensor(row, dtype=torch.int64) for row in ids]
        (found,) = score([loaded.model], rows, device=device)
        bits[lang] = found.nll / math.log(2)
        sizes[lang] = np.array([len(text.encode()) for text in texts], dtype=np.float64)
        if on_language is not None:
            on_language(lang)
    return Loss(bits, sizes)


def _marks(config: Any) -> list[int]:
    marks = (getattr(config, "bos_token_id", None), getattr(config, "eos_token_id", None))
    return [mark for mark in marks if isinstance(mark, int)][:1]
