"""Documents of a TEXTS folder, read strictly, all at once or one after the other.

A TEXTS folder holds one file per language, named by its code: `<lang>.txt` (one document or
sentence per line), `<lang>.jsonl` (objects with "text") or `<lang>.parquet` (column "text").
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError, UsageError, one_line
from .weighting import LANGUAGE

MAX_LINE_BYTES = 100_000_000
SUFFIXES = (".txt", ".jsonl", ".parquet")


_PARQUET_ROWS = 256  # rows in memory at once
_PARQUET_BUFFER = 1 << 20  # bytes of a compressed column read at once


class Documents:
    """The documents of one language in file order, blank ones left out.

    Every iteration reads the files anew and holds one line (or a few rows) at a time, so whoever
    stops early reads, and checks, no more than that. InputError names file and line of what cannot
    be used. empty counts the objects and rows without text that the last iteration left out; blank
    lines are no documents.
    """

    def __init__(self, paths: list[Path], parallel: bool = False):
        self.paths, self.parallel = paths, parallel
        self.empty = 0

    def __iter__(self) -> Iterator[str]:
        self.empty = 0
        for path in self.paths:
            found = False
            for where, text in _documents(path, self.parallel):
                if text.strip():
                    found = True
                    yield text
                elif self.parallel:
                    raise InputError(
                        f"{where} holds no text, so it cannot be paired with other languages"
                    )
                else:
                    self.empty += 1
            if not found:
                raise InputError(f"{path} is empty: it holds no text")


def open_texts(folder: str | os.PathLike, *, parallel: bool = False) -> dict[str, Documents]:
    """The languages of a folder, by file name, none of them read yet. See read_texts."""
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
    found: dict[str, list[Path]] = {}
    for path in files:
        if not LANGUAGE.fullmatch(path.stem):
            raise InputError(
                f"{path} is not named by a language code such as en, zh-Hant or fil, so its "
                "language is unknown"
            )
        found.setdefault(path.stem, []).append(path)
    return {lang: Documents(paths, parallel) for lang, paths in found.items()}


def read_texts(folder: str | os.PathLike, *, parallel: bool = False) -> dict[str, list[str]]:
    """Documents per language, in file order. InputError names file and line of what cannot be used.

    parallel=True asks for line i to be the same sentence in every language: the same number of
    lines everywhere and none of them blank. Otherwise blank lines are skipped.
    """
    texts = {lang: list(found) for lang, found in open_texts(folder, parallel=parallel).items()}
    if parallel and len({len(lines) for lines in texts.values()}) > 1:
        raise InputError(
            "parallel texts need as many lines in every language, not "
            + ", ".join(f"{lang} {len(lines)}" for lang, lines in sorted(texts.items()))
        )
    return texts


def _documents(path: Path, parallel: bool) -> Iterator[tuple[str, str]]:
    """(where it stands, text) of every document of a file."""
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    blank = 0
    for number, line in read_lines(path):
        if not line.strip():
            blank = blank or number
            continue
        if blank and parallel:
            raise InputError(
                f"{path} line {blank} is blank, so its lines cannot be paired with other languages"
            )
        where = f"{path} line {number}"
        yield where, line if path.suffix == ".txt" else _json_text(path, number, line)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
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
                raise InputError(
                    f"{path} {_place(raw, raw.index(0), number, offset)} holds a NUL byte; "
                    "is it text?"
                )
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                # utf-8-sig counts from behind the mark it took off.
                at = error.start + 3 * raw.startswith(b"\xef\xbb\xbf") * (number == 1)
                raise InputError(
                    f"{path} {_place(raw, at, number, offset)} is not UTF-8: 0x{raw[at]:02x}"
                ) from None
            offset += len(raw)
            yield number, line.rstrip("\r\n")


def _place(raw: bytes, at: int, number: int, offset: int) -> str:
    """Where byte `at` of a line stands: line, character of the line, byte of the file."""
    column = len(raw[:at].removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")) + 1
    return f"line {number}, column {column} (byte {offset + at} of the file)"


def _json_text(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} line {number}{json_reason(error)}") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{path} line {number} is not a JSON object with a string "text"')
    return _clean(text, f"{path} line {number}")


def json_reason(error: Exception) -> str:
    """What follows "FILE line N" where json.loads refused the line."""
    if isinstance(error, json.JSONDecodeError):
        return f" is not a JSON object: {error.msg} at column {error.colno}"
    deep = isinstance(error, RecursionError)
    return f" is not a JSON object: {'nested too deeply' if deep else one_line(error, 100)}"


def _parquet(path: Path) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError(
            f"reading {path} needs pyarrow: pip install 'distaya-ext[parquet]'"
        ) from error
    row = 0
    try:
        file = pq.ParquetFile(path, buffer_size=_PARQUET_BUFFER, pre_buffer=False)
        column = file.schema_arrow.field("text").type if "text" in file.schema_arrow.names else None
        if column is None or not (pa.types.is_string(column) or pa.types.is_large_string(column)):
            found = "none" if column is None else f"one of type {column}"
            raise InputError(f'{path} needs a string column "text" and has {found}')
        for batch in file.iter_batches(_PARQUET_ROWS, columns=["text"]):
            for text in batch.column(0).to_pylist():
                row += 1
                if text is None:
                    raise InputError(f"{path} row {row} has no text")
                yield f"{path} row {row}", _clean(text, f"{path} row {row}")
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
