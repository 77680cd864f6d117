"""Text in many languages, cut into windows: as many in every language, or by quotas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .documents import read_texts
from .errors import InputError, UsageError
from .tokenizer import check_tokenised, encode, separator

__all__ = ["Windows", "check_window", "counts", "planned", "read_texts", "share", "windows"]

_OVERSAMPLE = 4  # a seeded choice is made among this many times the windows asked for
_BATCH = 64  # documents tokenised at once
_BATCH_CHARACTERS = 1 << 20  # and about as many characters at most, where texts are streamed


@dataclass(frozen=True)
class Windows:
    """Token windows, ids int64 [N, window], row i in the language languages[i], languages in turn.

    tokens_per_language counts the tokens in the windows, fertility is tokens per character and
    bytes_per_token the UTF-8 bytes a token stands for, both over the text that was tokenised.
    limited_by names the language whose text ran out first when fewer windows than asked for were
    cut; duplicates counts the documents that repeat an earlier one, empty those without text and
    one_token those of a single token (of the ones that were tokenised), each where there are any;
    left_out names the languages that quotas leave without a window.
    """

    ids: torch.Tensor
    languages: list[str]
    tokens_per_language: dict[str, int]
    fertility: dict[str, float] = field(default_factory=dict)
    bytes_per_token: dict[str, float] = field(default_factory=dict)
    limited_by: str | None = None
    duplicates: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    empty: dict[str, int] = field(default_factory=dict)
    one_token: dict[str, int] = field(default_factory=dict)

    @property
    def per_language(self) -> int:
        """Windows per language, where every language has as many."""
        return len(self.languages) // max(1, len(self.tokens_per_language))


def windows(
    texts: Mapping[str, Iterable[str]],
    tokenizer: Any,
    *,
    tokens: int | None,
    window: int,
    seed: int = 0,
    quotas: Mapping[str, int] | None = None,
) -> Windows:
    """Cut texts into windows of `window` tokens, `tokens` at most in all: as many in every
    language, or quotas[lang] tokens of the languages named and an equal share of the rest of
    `tokens` of each other one.

    Each window starts with BOS where the tokenizer has one. The documents of a language are joined
    with a separator between them and a seeded choice is made among the windows, the same on every
    machine. Without quotas it is made among all of a language's documents. With quotas documents
    are read in file order only until they hold four times the tokens asked for, and the choice is
    made among those: what stands further down in the file is neither read nor checked, and memory
    depends on the quota, not on the file.

    tokens=None takes what the shortest language can give (with quotas: nothing beside them).
    Without a quota, languages with less text than their share limit all that share, which
    limited_by tells; InputError with the counts when one has not even a window, or not its quota.
    """
    wanted = planned(list(texts), tokens, window, quotas)
    bos = tokenizer.bos_token_id
    body = window - (bos is not None)
    read = texts = {lang: texts[lang] for lang, n in wanted.items() if n != 0}
    if quotas is None:
        texts = {lang: list(documents) for lang, documents in texts.items()}
    streams = {
        lang: _Stream(
            lang,
            documents,
            tokenizer,
            seed,
            None if wanted[lang] is None else wanted[lang] * body,
            streamed=quotas is not None,
        )
        for lang, documents in texts.items()
    }
    able = {lang: len(stream.ids) // body for lang, stream in streams.items()}
    if not min(able.values()):
        raise InputError(
            f"too little text for one window of {window} tokens in "
            f"{counts({lang: streams[lang].ids for lang, n in able.items() if not n}, len)} tokens"
        )
    count, limited_by = _agreed(wanted, able, quotas or {}, window)
    chosen = {lang: stream.choose(count[lang], body, bos, seed) for lang, stream in streams.items()}
    turns = sorted((place, at) for at, lang in enumerate(chosen) for place in _places(count[lang]))
    taken = {lang: iter(rows) for lang, rows in chosen.items()}
    languages = [list(chosen)[at] for _, at in turns]
    return Windows(
        ids=torch.stack([next(taken[lang]) for lang in languages]),
        languages=languages,
        tokens_per_language={lang: n * window for lang, n in count.items()},
        fertility={lang: stream.tokens / stream.characters for lang, stream in streams.items()},
        bytes_per_token={lang: stream.bytes / stream.tokens for lang, stream in streams.items()},
        limited_by=limited_by,
        duplicates={lang: n for lang, stream in streams.items() if (n := stream.duplicates)},
        left_out=[lang for lang, n in wanted.items() if n == 0],
        empty={lang: n for lang, found in read.items() if (n := getattr(found, "empty", 0))},
        one_token={lang: n for lang, stream in streams.items() if (n := stream.one_token)},
    )


def planned(
    languages: list[str], tokens: int | None, window: int, quotas: Mapping[str, int] | None
) -> dict[str, int | None]:
    """Windows per language out of `tokens` in all (None: as many as there are).

    InputError for quotas of languages that are not there, below one window, or beyond `tokens`,
    and when no language gets anything. A quota of 0 leaves a language out.
    """
    if quotas is None:
        return dict.fromkeys(languages, share(tokens, window, len(languages)))
    share(None, window, len(languages))  # a window too short, no language at all
    strange = sorted(set(quotas) - set(languages))
    if strange:
        raise InputError(
            f"there is a quota for {', '.join(strange)}, but the texts are in "
            f"{', '.join(sorted(languages))}"
        )
    for lang, quota in quotas.items():
        if quota < 0 or 0 < quota < window:
            raise InputError(
                f"the quota of {quota} tokens for {lang} does not fill one window of {window}"
            )
    asked = sum(quotas.values())
    if not asked and not set(languages) - set(quotas):
        raise InputError("every quota is 0, so there is nothing to calibrate with")
    if tokens is not None and asked > tokens:
        raise InputError(
            f"the quotas ask for {asked} tokens, more than the {tokens} allowed; raise tokens"
        )
    others = len(languages) - len(quotas)
    rest = 0 if tokens is None or not others else (tokens - asked) // (window * others)
    if not asked and not rest:
        raise InputError(
            f"{tokens} tokens are fewer than one window of {window} in each of {others} "
            f"languages, {window * others} tokens"
        )
    return {lang: quotas[lang] // window if lang in quotas else rest for lang in languages}


def _agreed(
    wanted: Mapping[str, int | None],
    able: Mapping[str, int],
    quotas: Mapping[str, int],
    window: int,
) -> tuple[dict[str, int], str | None]:
    """Windows per language that there are, and the language that limits those without a quota."""
    short = {lang: able[lang] for lang in able if lang in quotas and able[lang] < wanted[lang]}
    if short:
        raise InputError(
            "too little text for the quotas in tokens: "
            + ", ".join(
                f"{lang} has {n * window} of {wanted[lang] * window}"
                for lang, n in sorted(short.items())
            )
        )
    count = {lang: wanted[lang] for lang in able if lang in quotas}
    sharing = {lang: n for lang, n in able.items() if lang not in quotas}
    if not sharing:
        return {lang: count[lang] for lang in able}, None
    shortest = min(sharing, key=sharing.__getitem__)
    asked = wanted[shortest]
    each = sharing[shortest] if asked is None else min(asked, sharing[shortest])
    count |= dict.fromkeys(sharing, each)
    limited_by = shortest if asked is not None and each < asked else None
    return {lang: count[lang] for lang in able}, limited_by


def _places(count: int) -> list[float]:
    """Where a language's windows stand in the row of all, from 0 to 1: evenly spread."""
    return [(i + 0.5) / count for i in range(count)]


def share(tokens: int | None, window: int, languages: int) -> int | None:
    """Windows each language gets out of `tokens` in all (None: no cap). InputError when none."""
    if not languages:
        raise InputError("there is no text in any language")
    if window < 2:
        raise InputError(f"a window needs at least 2 tokens, not {window}")
    wanted = None if tokens is None else tokens // (window * languages)
    if wanted == 0:
        raise InputError(
            f"{tokens} tokens are fewer than one window of {window} in each of {languages} "
            f"languages, {window * languages} tokens"
        )
    return wanted


def check_window(window: int, config: Any) -> None:
    """UsageError for windows that are longer than the model of the config has positions."""
    room = getattr(config, "max_position_embeddings", None)
    if room is not None and window > room:
        raise UsageError(f"windows of {window} tokens exceed the model's {room} positions")


class _Stream:
    """Tokens of one language: documents in seeded order, each behind a separator, until enough."""

    def __init__(
        self,
        lang: str,
        documents: Iterable[str],
        tokenizer: Any,
        seed: int,
        needed: int | None,
        streamed: bool,
    ):
        self.lang = lang
        self.tokens = self.characters = self.bytes = self.duplicates = self.one_token = 0
        mark = separator(tokenizer)
        parts: list[np.ndarray] = []
        length = 0
        if streamed:
            batches = self._as_they_come(documents)
        else:
            batches = self._shuffled(documents, None if needed is None else seed)
        for batch in batches:
            for ids in encode(tokenizer, batch):
                self.tokens += len(ids)
                self.one_token += len(ids) == 1
                length += len(mark) + len(ids)
                parts.append(np.asarray(mark + ids, dtype=np.int64))
            self.characters += sum(map(len, batch))
            self.bytes += sum(len(text.encode()) for text in batch)
            if needed is not None and length >= _OVERSAMPLE * needed:
                break
        check_tokenised(lang, self.tokens, self.characters)
        if streamed:
            order = np.arange(len(parts))
            _rng(seed, lang, 0).shuffle(order)
            parts = [parts[i] for i in order]
        self.ids = np.concatenate(parts)

    def _shuffled(self, documents: list[str], seed: int | None) -> Iterator[list[str]]:
        """All documents, a batch at a time, in seeded order (None: as they stand)."""
        self.duplicates = len(documents) - len(set(documents))
        order = np.arange(len(documents))
        if seed is not None:
            _rng(seed, self.lang, 0).shuffle(order)
        for start in range(0, len(order), _BATCH):
            yield [documents[i] for i in order[start : start + _BATCH]]

    def _as_they_come(self, documents: Iterable[str]) -> Iterator[list[str]]:
        """Documents in file order, a batch at a time, read no sooner than they are asked for."""
        seen: set[int] = set()
        batch: list[str] = []
        for number, text in enumerate(documents, 1):
            batch.append(text)
            seen.add(hash(text))
            self.duplicates = number - len(seen)
            if len(batch) == _BATCH or sum(map(len, batch)) >= _BATCH_CHARACTERS:
                yield batch
                batch = []
        if batch:
            yield batch

    def choose(self, count: int, body: int, bos: int | None, seed: int) -> torch.Tensor:
        """`count` windows [count, body + BOS] out of those the stream holds, in reading order."""
        rows = torch.from_numpy(self.ids[: len(self.ids) // body * body].reshape(-1, body))
        picked = np.sort(_rng(seed, self.lang, 1).choice(len(rows), size=count, replace=False))
        rows = rows[torch.from_numpy(picked)]
        return rows if bos is None else torch.cat([torch.full((count, 1), bos), rows], dim=1)


def _rng(seed: int, lang: str, purpose: int) -> np.random.Generator:
    # A stream of its own for each language: adding a language does not change the others' windows.
    return np.random.default_rng([seed, purpose, *lang.encode()])


def counts(mapping: Mapping[str, Any], count: Any) -> str:
    """'en 3, ja 5': what count() gives for every language, for error sentences."""
    return ", ".join(f"{lang} {count(value)}" for lang, value in sorted(mapping.items()))
