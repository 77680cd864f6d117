"""What a run depends on, as small records that can be compared and told apart in a sentence.

One place for all runs that can be gone on with: compress, chains, training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import check_companions
from ..documents import open_texts

_BLOCK = 1 << 22
_MOST_HEADER = 100_000_000  # bytes; the format allows no more
_SAMPLES, _SAMPLE = 256, 4096  # pieces of a shard, bytes of each
MOST_TOLD = 5  # differences told one by one


def model_identity(folder: Path) -> dict[str, str]:
    """File name -> size and hash: of a shard its header and samples of its weights are hashed, of
    configuration and tokenizer everything. Licences and readmes decide nothing.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found[path.name] = f"{path.stat().st_size} bytes, {_shard_hash(path)}"
    for name in check_companions(folder):
        if not name.startswith(("LICENSE", "NOTICE", "README")):
            path = folder / name
            found[name] = f"{path.stat().st_size} bytes, {file_hash(path)}"
    return found


def texts_identity(texts: Any) -> dict[str, str] | str | None:
    """Of a folder (or file) the hash of every language's files, of token windows that of the tokens
    and their languages, of nothing None.
    """
    if texts is None:
        return None
    if isinstance(texts, (str, Path)) and Path(texts).is_file():  # chats
        return {Path(texts).name: file_hash(Path(texts))}
    if isinstance(texts, (str, Path)):
        return {
            path.name: file_hash(path)
            for found in open_texts(texts).values()
            for path in found.paths
        }
    ids: torch.Tensor = texts.ids
    made = hashlib.sha256(ids.contiguous().cpu().numpy().tobytes())
    made.update(json.dumps([list(ids.shape), list(texts.languages)]).encode())
    return f"windows {made.hexdigest()[:16]}"


def file_hash(path: Path) -> str:
    """The first 16 digits of a file's SHA-256."""
    made = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            made.update(block)
    return made.hexdigest()[:16]


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """SHA-256 of a record of plain values, whatever the order of its keys."""
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def difference(
    old: Mapping[str, Any], new: Mapping[str, Any], words: str = "{name} was {old} and is {new}"
) -> str:
    """Everything that differs between two records, in words; of more than MOST_TOLD things the
    first, and how many there are.
    """
    was, now = dict(_flat(old)), dict(_flat(new))
    changed = [key for key in {**now, **was} if _get(was, key) != _get(now, key)]
    if not changed:
        return "nothing"
    told = [
        words.format(name=key, old=_short(was, key), new=_short(now, key))
        for key in changed[:MOST_TOLD]
    ]
    more = f" (and {len(changed) - MOST_TOLD} more)" if len(changed) > MOST_TOLD else ""
    return "; ".join(told) + more


def kernels(device: torch.device) -> dict[str, str]:
    """What decides the last bits of a result: the device, the kernels chosen on it, torch."""
    from ..ops import machine

    found = {"device": device.type, "isa": machine.isa(), "torch": torch.__version__}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found["gpu"] = f"{torch.cuda.get_device_name(device)} ({major}.{minor})"
    return found


def _get(values: Mapping[str, Any], key: str) -> tuple[Any, ...]:
    return (values[key],) if key in values else ()


def _short(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key])[:60] if key in values else "not there"


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in nested mappings; lists are values."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _shard_hash(path: Path) -> str:
    """Of the header, and of pieces all over the weights: a model that was trained further has the
    same header and other weights nearly everywhere, and reading all of it would take minutes.
    """
    with open(path, "rb") as file:
        length = file.read(8)
        size = min(int.from_bytes(length, "little"), _MOST_HEADER)
        made = hashlib.sha256(length + file.read(size))
        start, end = 8 + size, path.stat().st_size
        for i in range(_SAMPLES):
            file.seek(start + max(0, end - start - _SAMPLE) * i // (_SAMPLES - 1))
            made.update(file.read(_SAMPLE))
    return made.hexdigest()[:16]
