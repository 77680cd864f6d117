"""Text in many languages: read a folder strictly, cut it into windows balanced over languages.

A TEXTS folder holds one file per language, named by its code: `<lang>.txt` (one document or
sentence per line), `<lang>.jsonl` (objects with "text") or `<lang>.parquet` (column "text").
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import InputError, UsageError
from .tokenizer import check_tokenised, encode, separator

MAX_LINE_BYTES = 100_000_000
SUFFIXES = (".txt", ".jsonl", ".parquet")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*")

_OVERSAMPLE = 4  # a seeded choice is made among this many times the windows asked for
_BATCH = 64  # documents tokenised at once


@dataclass(frozen=True)
class Windows:
    """Token windows, ids int64 [N, window], row i in the language languages[i], languages in turn.

    tokens_per_language counts the tokens in the windows, fertility is tokens per character and
    bytes_per_token the UTF-8 bytes a token stands for, both over the text that was tokenised.
    limited_by names the language whose text ran out first when fewer windows than asked for were
    cut; duplicates counts the documents that repeat an earlier one, where there are any.
    """

    ids: torch.Tensor
    languages: list[str]
    tokens_per_language: dict[str, int]
    fertility: dict[str, float] = field(default_factory=dict)
    bytes_per_token: dict[str, float] = field(default_factory=dict)
    limited_by: str | None = None
    duplicates: dict[str, int] = field(default_factory=dict)

    @property
    def per_language(self) -> int:
        """Windows per language."""
        return len(self.languages) // max(1, len(self.tokens_per_language))


def read_texts(folder: str | os.PathLike, *, parallel: bool = False) -> dict[str, list[str]]:
    """Documents per language, in file order. InputError names file and line of what cannot be used.

    parallel=True asks for line i to be the same sentence in every language: the same number of
    lines everywhere and none of them blank. Otherwise blank lines are skipped.
    """
    root = Path(folder)
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise InputError(
            f"text folder {root} {what}; it must hold <lang>.txt, .jsonl or .parquet files"
        )
    files = [
        p
        for p in sorted(root.iterdir())
        if p.suffix in SUFFIXES and p.is_file() and not p.name.startswith(".")
    ]
    if not files:
        raise InputError(
            f"text folder {root} holds no {', '.join('<lang>' + s for s in SUFFIXES)} file"
        )
    texts: dict[str, list[str]] = {}
    for path in files:
        if not LANGUAGE.fullmatch(path.stem):
            raise InputError(
                f"{path} is not named by a language code such as en, zh-Hant or fil, so its "
                "language is unknown"
            )
        documents = [text for text in _documents(path, parallel) if text.strip()]
        if not documents:
            raise InputError(f"{path} is empty: it holds no text")
        texts.setdefault(path.stem, []).extend(documents)
    if parallel and len({len(lines) for lines in texts.values()}) > 1:
        raise InputError(
            f"parallel texts need as many lines in every language, not {counts(texts, len)}"
        )
    return texts


def windows(
    texts: Mapping[str, list[str]],
    tokenizer: Any,
    *,
    tokens: int | None,
    window: int,
    seed: int = 0,
) -> Windows:
    """Cut texts into windows of `window` tokens, as many in every language, `tokens` at most in
    all.

    Each window starts with BOS where the tokenizer has one. The documents of a language are joined
    with a separator between them and a seeded choice is made among the windows, the same on every
    machine. tokens=None takes what the shortest language can give. InputError with the counts when
    a language has too little.
    """
    wanted = share(tokens, window, len(texts))
    bos = tokenizer.bos_token_id
    body = window - (bos is not None)
    streams = {
        lang: _Stream(lang, documents, tokenizer, seed, None if wanted is None else wanted * body)
        for lang, documents in texts.items()
    }
    able = {lang: len(stream.ids) // body for lang, stream in streams.items()}
    if not min(able.values()):
        raise InputError(
            f"too little text for one window of {window} tokens in "
            f"{counts({lang: streams[lang].ids for lang, n in able.items() if not n}, len)} tokens"
        )
    shortest = min(able, key=able.__getitem__)
    count = able[shortest] if wanted is None else min(wanted, able[shortest])
    chosen = {lang: stream.choose(count, body, bos, seed) for lang, stream in streams.items()}
    return Windows(
        ids=torch.stack(list(chosen.values()), dim=1).reshape(-1, window).contiguous(),
        languages=list(texts) * count,
        tokens_per_language=dict.fromkeys(texts, count * window),
        fertility={lang: stream.tokens / stream.characters for lang, stream in streams.items()},
        bytes_per_token={lang: stream.bytes / stream.tokens for lang, stream in streams.items()},
        limited_by=shortest if wanted is not None and count < wanted else None,
        duplicates={lang: n for lang, d in texts.items() if (n := len(d) - len(set(d)))},
    )


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
        self, lang: str, documents: list[str], tokenizer: Any, seed: int, needed: int | None
    ):
        self.lang = lang
        self.tokens = self.characters = self.bytes = 0
        order = np.arange(len(documents))
        if needed is not None:
            _rng(seed, lang, 0).shuffle(order)
        mark = separator(tokenizer)
        parts: list[np.ndarray] = []
        length = 0
        for start in range(0, len(order), _BATCH):
            batch = [documents[i] for i in order[start : start + _BATCH]]
            for ids in encode(tokenizer, batch):
                self.tokens += len(ids)
                length += len(mark) + len(ids)
                parts.append(np.asarray(mark + ids, dtype=np.int64))
            self.characters += sum(map(len, batch))
            self.bytes += sum(len(text.encode()) for text in batch)
            if needed is not None and length >= _OVERSAMPLE * needed:
                break
        check_tokenised(lang, self.tokens, self.characters)
        self.ids = np.concatenate(parts)

    def choose(self, count: int, body: int, bos: int | None, seed: int) -> torch.Tensor:
        """`count` windows [count, body + BOS] out of those the stream holds, in reading order."""
        rows = torch.from_numpy(self.ids[: len(self.ids) // body * body].reshape(-1, body))
        picked = np.sort(_rng(seed, self.lang, 1).choice(len(rows), size=count, replace=False))
        rows = rows[torch.from_numpy(picked)]
        return rows if bos is None else torch.cat([torch.full((count, 1), bos), rows], dim=1)


def _rng(seed: int, lang: str, purpose: int) -> np.random.Generator:
    # A stream of its own for each language: adding a language does not change the others' windows.
    return np.random.default_rng([seed, purpose, *lang.encode()])


def _documents(path: Path, parallel: bool) -> Iterator[str]:
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    blank = 0
    for number, line in _lines(path):
        if not line.strip():
            blank = blank or number
            continue
        if blank and parallel:
            raise InputError(
                f"{path} line {blank} is blank, so its lines cannot be paired with other languages"
            )
        yield line if path.suffix == ".txt" else _json_text(path, number, line)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of a UTF-8 file, checked strictly."""
    offset = number = 0
    with open(path, "rb") as file:
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                raise InputError(
                    f"{path} line {number} is longer than {MAX_LINE_BYTES} bytes; is it text?"
                )
            if b"\0" in raw:
                at = offset + raw.index(b"\0")
                raise InputError(
                    f"{path} line {number} holds a NUL byte (at byte {at}); is it text?"
                )
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                # utf-8-sig counts from behind the mark it took off.
                at = offset + error.start + 3 * raw.startswith(b"\xef\xbb\xbf") * (number == 1)
                raise InputError(
                    f"{path} line {number} is not UTF-8: byte 0x{raw[at - offset]:02x} at byte "
                    f"{at} of the file"
                ) from None
            offset += len(raw)
            yield number, line.rstrip("\r\n")


def _json_text(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise InputError(f"{path} line {number} is not a JSON object: {reason}") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{path} line {number} is not a JSON object with a string "text"')
    return _clean(text, f"{path} line {number}")


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError(
            f"reading {path} needs pyarrow: pip install 'distaya-ext[parquet]'"
        ) from error
    row = 0
    try:
        file = pq.ParquetFile(path)
        column = file.schema_arrow.field("text").type if "text" in file.schema_arrow.names else None
        if column is None or not (pa.types.is_string(column) or pa.types.is_large_string(column)):
            found = "none" if column is None else f"one of type {column}"
            raise InputError(f'{path} needs a string column "text" and has {found}')
        for batch in file.iter_batches(columns=["text"]):
            for text in batch.column(0).to_pylist():
                row += 1
                if text is None:
                    raise InputError(f"{path} row {row} has no text")
                yield _clean(text, f"{path} row {row}")
    except UnicodeDecodeError:
        raise InputError(f"{path} holds text that is not UTF-8 near row {row + 1}") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is not a readable parquet file: {reason}") from None


def _clean(text: str, where: str) -> str:
    if "\0" in text:
        raise InputError(f"{where} holds a NUL character; is it text?")
    if len(text) > MAX_LINE_BYTES:
        raise InputError(f"{where} is longer than {MAX_LINE_BYTES} characters; is it text?")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where} holds half a surrogate pair (character {error.start})") from None
    return text


def counts(mapping: Mapping[str, Any], count: Any) -> str:
    """'en 3, ja 5': what count() gives for every language, for error sentences."""
    return ", ".join(f"{lang} {count(value)}" for lang, value in sorted(mapping.items()))
