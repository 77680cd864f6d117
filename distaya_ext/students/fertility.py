"""What a tokenizer makes of each language: how many tokens, and whether the text comes back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..tokenizer import check_tokenised, encode

_NO_SPACES = ("ja", "km", "lo", "my", "th", "zh")  # languages written without spaces between words
_BATCH = 256  # lines tokenised at once


@dataclass(frozen=True)
class Fertility:
    """One language: counts over the lines looked at. lossless: share of lines that decode to
    themselves; unknown: share of tokens that stand for what the tokenizer does not know.
    """

    language: str
    characters: int
    bytes: int
    words: int | None  # None where words are not set apart by spaces
    tokens: int
    lossless: float
    unknown: float

    @property
    def per_character(self) -> float:
        return self.tokens / self.characters

    @property
    def per_word(self) -> float | None:
        return self.tokens / self.words if self.words else None

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        ratios = {
            "tokens_per_character": self.per_character,
            "tokens_per_word": self.per_word,
            "bytes_per_token": self.bytes_per_token,
        }
        counts = {"characters": self.characters, "bytes": self.bytes, "tokens": self.tokens}
        return counts | ratios | {"lossless": self.lossless, "unknown": self.unknown}


@dataclass(frozen=True)
class Tokenized:
    """All languages; digest is the same for tokenizers that give the same tokens and vocabulary."""

    languages: list[Fertility]
    digest: str

    @property
    def tokens_per_byte(self) -> float:
        """Over all text."""
        return sum(x.tokens for x in self.languages) / sum(x.bytes for x in self.languages)

    def worst(self, count: int = 3) -> list[Fertility]:
        """The languages whose tokens stand for least text: fewest bytes, worst first."""
        return sorted(self.languages, key=lambda x: (x.bytes_per_token, x.language))[:count]


def fertility(tokenizer: Any, texts: Mapping[str, Iterable[str]]) -> Tokenized:
    """Tokenise lines per language, alone and without special tokens. InputError for a language
    that becomes no token at all.
    """
    digest = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode())
    found = []
    for language, lines in texts.items():
        found.append(_language(tokenizer, language, list(lines), digest))
    return Tokenized(found, digest.hexdigest())


def _language(tokenizer: Any, language: str, lines: list[str], digest: Any) -> Fertility:
    unknown_id = tokenizer.unk_token_id
    tokens = same = unknown = 0
    for start in range(0, len(lines), _BATCH):
        batch = lines[start : start + _BATCH]
        rows = encode(tokenizer, batch)
        back = [
            tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for ids in rows
        ]
        same += sum(a == b for a, b in zip(batch, back, strict=True))
        tokens += sum(map(len, rows))
        unknown += sum(row.count(unknown_id) for row in rows) if unknown_id is not None else 0
        for row in rows:
            digest.update(np.asarray([len(row), *row], dtype="<i8").tobytes())
    characters = sum(map(len, lines))
    check_tokenised(language, tokens, characters)
    return Fertility(
        language=language,
        characters=characters,
        bytes=sum(len(line.encode()) for line in lines),
        words=None if language[:2] in _NO_SPACES else sum(len(line.split()) for line in lines),
        tokens=tokens,
        lossless=same / len(lines),
        unknown=unknown / tokens,
    )
