"""Texts of the quality bench: that its splits share nothing, and the windows it judges on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
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
    seen, lines, keys = set(), set(), set()
    for text, key in _documents(calibration):
        seen.add(_normal(text))
        lines.update(_long(text))
        keys.add(key)
    found: list[str] = []
    paragraphs = of = 0
    for text, key in _documents(test):
        if _normal(text) in seen or (key is not None and key in keys):
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


def _documents(folder: Path) -> Iterable[tuple[str, str | None]]:
    """(text, "doc" key or None) of every document of a folder."""
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".txt", ".jsonl"):
            continue
        for line in path.read_text(encoding="utf-8").split("\n"):
            if path.suffix == ".txt" and line.strip():
                yield line, None
            elif line.strip():
                record = json.loads(line)
                yield record["text"], record.get("doc")


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()


def _long(text: str) -> set[str]:
    return {line for part in text.split("\n") if len(line := _normal(part)) >= _LONG}
