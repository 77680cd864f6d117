"""Texts of the quality bench: that its splits share nothing, and the windows it judges on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.plain import read_folder, windows

_LONG = 200  # characters of a paragraph that two texts hardly share by chance


@dataclass(frozen=True)
class Shared:
    """What calibration and test have in common.

    documents: test documents whose text (white space aside), or whose "doc" key, is also one of
    calibration. paragraphs: those of at least 200 characters, of how many.
    """

    documents: list[str]
    paragraphs: int
    of: int

    def __str__(self) -> str:
        return (
            f"{len(self.documents)} documents and {self.paragraphs} of {self.of} long paragraphs "
            "of the test texts also stand in the calibration texts"
        )


def shared(calibration: Path, test: Path) -> Shared:
    """Compare the documents of two folders of texts, language by language and by "doc" key."""
    seen: set[int] = set()  # of hashes: calibration texts may be gigabytes
    lines: set[int] = set()
    keys: set[str | None] = set()
    for text, key in _documents(calibration):
        seen.add(hash(_normal(text)))
        lines.update(_long(text))
        keys.add(key)
    found: list[str] = []
    paragraphs = of = 0
    for text, key in _documents(test):
        if hash(_normal(text)) in seen or (key is not None and key in keys):
            found.append(key or text[:60])
        here = _long(text)
        of += len(here)
        paragraphs += sum(line in lines for line in here)
    return Shared(found, paragraphs, of)


def fingerprint(folder: Path, names: Iterable[str]) -> str:
    """The first 16 hex digits of sha256 over the named files that exist, names included."""
    digest = hashlib.sha256()
    for path in sorted(p for name in names for p in folder.glob(name) if p.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with open(path, "rb") as file:
            while part := file.read(1 << 22):
                digest.update(part)
    return digest.hexdigest()[:16]


def test_windows(folder: Path, tokenizer, length: int, count: int | None) -> dict[str, Tensor]:
    """{language: int64 [n, length]}: `count` windows of each language, or all there are.

    A language's documents are joined in file order (BOS text EOS ...) and cut; the `count` windows
    are the first of as many equal shares, so that they come from the whole file and not from its
    first documents alone.
    """
    found = {}
    for lang, texts in read_folder(folder).items():
        cut = windows(texts, tokenizer, length)
        if len(cut) < max(2, count or 0):
            raise SystemExit(
                f"{folder.name}/{lang} gives {len(cut)} windows of {length} tokens; "
                f"{max(2, count or 0)} are needed"
            )
        if count:
            cut = cut[torch.arange(count) * len(cut) // count]
        found[lang] = cut
    return found


def _documents(folder: Path) -> Iterator[tuple[str, str | None]]:
    """(text, "doc" key or None) of every document of a folder."""
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".txt", ".jsonl"):
            continue
        with open(path, encoding="utf-8", newline="\n") as file:
            for line in filter(str.strip, file):
                record = {"text": line} if path.suffix == ".txt" else json.loads(line)
                yield record["text"], record.get("doc")


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()


def _long(text: str) -> set[int]:
    """Hashes of the paragraphs that are long enough to tell."""
    return {hash(line) for part in text.split("\n") if len(line := _normal(part)) >= _LONG}
