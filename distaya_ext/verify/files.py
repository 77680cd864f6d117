"""The files of a folder against its manifest, and those that every folder must be able to read."""

from __future__ import annotations

import json
from pathlib import Path

from .. import manifest
from ..durable import describe
from ..errors import InputError
from .findings import Findings


def check_manifest(folder: Path, found: Findings) -> None:
    """Missing, extra and changed files, each by name. quick: sizes only."""
    if not (folder / manifest.NAME).exists():
        found.notes.append(f"there is no {manifest.NAME}: nothing says which bytes are right")
        return
    found.manifest = True
    try:
        held = manifest.read(folder)["files"]
    except InputError as error:
        found.add("manifest", manifest.NAME, str(error))
        return
    there = set(manifest.names(folder))
    for name in sorted(set(held) - there):
        found.add("missing", name, "the manifest lists it and it is not there")
    for name in sorted(there - set(held)):
        why = "it is left from a write that was stopped" if name.endswith(".partial") else ""
        found.add("extra", name, why or "it is in no manifest")
    for name in sorted(there & set(held)):
        found.looked["files"] += 1
        _check_file(folder / name, name, held[name], found)


def _check_file(path: Path, name: str, held: dict, found: Findings) -> None:
    if path.is_symlink():
        found.add("changed", name, "it is a link, and we write none")
        return
    if not path.is_file():  # a pipe would be waited on
        found.add("changed", name, "it is no plain file")
        return
    size = path.stat().st_size
    if size != held["size"]:
        found.add("changed", name, f"it has {size} bytes and had {held['size']}")
    elif not found.quick and describe(path) != held:
        found.add("changed", name, f"its {size} bytes are not those that were written")


def check_readable(folder: Path, found: Findings) -> None:
    """JSON that parses, and no shard beside those the index names."""
    for path in sorted(folder.glob("*.json")):
        if not path.is_file():
            found.add("unreadable", path.name, "it is no file, or a link to none")
            continue
        try:
            json.loads(path.read_bytes().decode("utf-8"))
        except (ValueError, RecursionError) as error:
            found.add("unreadable", path.name, f"it is no JSON ({error})")
    index = folder / "model.safetensors.index.json"
    single = (folder / "model.safetensors").is_file()
    if not single and not index.is_file():
        return  # the strict reader says so
    try:
        named = {"model.safetensors"} if single else set(_weight_map(index).values())
    except (ValueError, AttributeError, TypeError):
        return  # as above
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in named:
            found.add("extra", path.name, "it is a shard that nothing names")


def check_total(folder: Path, nbytes: int, found: Findings) -> None:
    """total_size of the index, where it says one."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return
    about = json.loads(index.read_text(encoding="utf-8")).get("metadata")
    told = about.get("total_size") if isinstance(about, dict) else None
    if type(told) is int and told != nbytes:
        found.add("index", index.name, f"it says {told} bytes of tensors and they are {nbytes}")


def _weight_map(index: Path) -> dict[str, str]:
    return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
