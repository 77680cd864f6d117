"""manifest.json of every folder we write: what is in it, who made it, and of what.

    {"format": 1, "created_by": "compress", "versions": {...}, "kernels": {...},
     "input": {"fingerprint": "...", ...} | null,
     "files": {"config.json": {"size": 700, "blake2b": "<64 digits>"}, ...}}

Hashes are BLAKE2b of 256 bits (RFC 7693). Names are those in the folder, with / between parts.
They tell damage and changes, not who made them: nothing is signed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .durable import describe, write_whole
from .errors import InputError
from .versions import versions

NAME = "manifest.json"
FORMAT = 1
_DIGEST = re.compile(r"[0-9a-f]{64}")
_OWN = {NAME, NAME + ".partial"}


def write(folder: Path, by: str | None = None, inputs: Mapping[str, Any] | None = None) -> Path:
    """Describe all files of a folder in its manifest.json, which is replaced.

    by      the command that made the folder; None: what the manifest there says
    inputs  plain values that say what it was made of (resume.identity); None: as by
    """
    before = _before(folder) if by is None else {}
    value = {
        "format": FORMAT,
        "created_by": by or before.get("created_by"),
        "versions": versions(),
        "kernels": _kernels(),
        "input": before.get("input") if inputs is None else _told(inputs),
        "files": {name: describe(folder / name) for name in names(folder)},
    }
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    path = folder / NAME
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))
    return path


def refresh(folder: Path, name: str) -> None:
    """Write the manifest again where it is there and tells of another file `name` than there is."""
    if not (folder / NAME).is_file():
        return
    held = read(folder)["files"].get(name)
    if held != (describe(folder / name) if (folder / name).is_file() else None):
        write(folder)


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, its form checked. InputError in a sentence."""
    from .checkpoint.folder import read_json

    value = read_json(folder, NAME)
    if value.get("format") != FORMAT:
        told = str(value.get("format"))[:40]
        raise InputError(f"{NAME} has the format {told}; this release reads {FORMAT}")
    files = value.get("files")
    if not isinstance(files, dict):
        raise InputError(f"{NAME} lists no files")
    for name, held in files.items():
        plain = name and not name.startswith("/") and "\\" not in name and "\0" not in name
        if not plain or any(part in ("", ".", "..") for part in name.split("/")):
            raise InputError(f"{NAME} names {name[:80]!r}, which is no file of its folder")
        if not _describes(held):
            raise InputError(f"{NAME} does not give size and blake2b of {name[:80]}")
    return value


def names(folder: Path) -> list[str]:
    """All files of a folder and of those in it but the manifest, sorted."""
    return sorted(set(_walk(folder, "")) - _OWN)


def _walk(folder: Path, above: str) -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path, f"{above}{path.name}/")
        else:
            yield above + path.name


def _describes(held: Any) -> bool:
    if not isinstance(held, dict) or set(held) != {"size", "blake2b"}:
        return False
    size, digest = held["size"], held["blake2b"]
    return type(size) is int and isinstance(digest, str) and bool(_DIGEST.fullmatch(digest))


def _before(folder: Path) -> dict[str, Any]:
    try:
        return read(folder) if (folder / NAME).is_file() else {}
    except InputError:  # a damaged one is written anew
        return {}


def _told(inputs: Mapping[str, Any]) -> dict[str, Any]:
    from .resume import fingerprint

    return {"fingerprint": fingerprint(inputs), **inputs}


def _kernels() -> dict[str, Any]:
    from .ops import machine

    return {"isa": machine.isa(), "cuda": machine.cuda_archs()}
