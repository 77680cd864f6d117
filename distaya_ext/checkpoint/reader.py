"""Strict reader over safetensors: everything promised is checked before any weight is used."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import InputError
from ..finite import all_finite
from ..models import Architecture, describe
from ..models.skeleton import build_skeleton, check_table, is_tied
from .folder import contained, locate, read_config, read_index

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CONFIG_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Old files carry tables that the model computes by itself; they are neither used nor copied.
_HARMLESS = re.compile(r"rotary_emb\.(\w+_)?inv_freq$|\.masked_bias$|self_attn\.bias$")
_FINITE_BLOCK = 1 << 22  # elements tested at once, so that the test itself takes no memory


@dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint: its file, shape and stored dtype (from the header only)."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: a type we do not compute with

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * (self.dtype.itemsize if self.dtype else 1)


class Checkpoint:
    """A model folder whose headers agree with its config; tensors are mapped from disk when asked
    for.
    """

    def __init__(self, folder: Path, config: Any, dtype: torch.dtype, entries: dict[str, Entry]):
        self.folder = folder
        self.config = config
        self.dtype = dtype  # the dtype the model runs in
        self.architecture: Architecture = describe(config)
        self.entries = entries
        self._finite: set[str] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def read(
        self, names: Iterable[str], device: str | torch.device = "cpu"
    ) -> dict[str, torch.Tensor]:
        """Tensors by name, in their stored dtype. On the CPU they are views of the mapped file.

        The first read of a tensor tests it; NaN or infinity raises InputError with its name and
        row.
        """
        names = list(names)
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted({self.entries[name].path for name in names}):
            # Opened anew each time: a mapping that stays open keeps every page it touched resident.
            with safe_open(path, framework="pt") as file:
                for name in names:
                    if self.entries[name].path == path:
                        tensors[name] = self._checked(name, file.get_tensor(name)).to(device)
        return {name: tensors[name] for name in names}

    def _checked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in self._finite:
            check_finite(name, tensor)
            self._finite.add(name)
        return tensor


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """InputError naming the tensor and its first row that holds NaN or infinity."""
    if all_finite(tensor):
        return
    rows = tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1)
    step = max(1, _FINITE_BLOCK // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        finite = torch.isfinite(rows[start : start + step]).all(dim=1)
        if not bool(finite.all()):
            row = start + int((~finite).nonzero()[0])
            raise InputError(
                f"weight {name} holds NaN or infinity, first in row {row} of {len(rows)}"
            )


def open_checkpoint(model: str | Path, *, offline: bool = False) -> Checkpoint:
    """Open a local folder or hub id and check all of it short of reading the weights.

    Config, shard names, presence and size of shards, and name, shape and dtype of every tensor
    against the model that transformers builds from the config. Raises InputError with one sentence.
    """
    folder = locate(model, offline=offline)
    raw = read_config(folder)
    weight_map = read_index(folder)
    entries = _headers(folder, weight_map)
    config = _config(folder)
    _check_depth(config, entries)
    dtype = _dtype(raw, entries, describe(raw))
    skeleton = build_skeleton(config, dtype)
    check_table(skeleton, describe(config))
    tied = is_tied(skeleton, describe(config))
    _compare({k: tuple(v.shape) for k, v in skeleton.state_dict().items()}, entries, tied)
    kept = {name: entry for name, entry in entries.items() if not _HARMLESS.search(name)}
    return Checkpoint(folder, config, dtype, kept)


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers and its validators raise many kinds here
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(
            f"config.json of {folder.name} is not usable: {' '.join(lines)[:300]}"
        ) from error


def _check_depth(config: Any, entries: dict[str, Entry]) -> None:
    """Refuse a wrong number of layers before a model of that depth is built."""
    start = f"{describe(config).layers}."
    names = (name[len(start) :].partition(".")[0] for name in entries if name.startswith(start))
    held = len({name for name in names if name.isdecimal()})
    asked = config.num_hidden_layers
    if asked != held or not held:
        raise InputError(
            f"config.json asks for {asked} decoder layers; the checkpoint holds {held}"
        )


def _dtype(raw: dict, entries: dict[str, Entry], architecture: Architecture) -> torch.dtype:
    name = raw.get("dtype") or raw.get("torch_dtype")
    if name is not None:
        if not isinstance(name, str) or name not in _CONFIG_DTYPES:
            raise InputError(
                f"config.json names dtype {name!r}; one of {', '.join(_CONFIG_DTYPES)} is needed"
            )
        return _CONFIG_DTYPES[name]
    embed = entries.get(f"{architecture.embed}.weight")
    return embed.dtype if embed is not None and embed.dtype is not None else torch.float32


def _headers(folder: Path, weight_map: dict[str, Path]) -> dict[str, Entry]:
    paths = sorted(set(weight_map.values())) or [contained(folder, "model.safetensors")]
    entries: dict[str, Entry] = {}
    for path in paths:
        for name, entry in _header(path).items():
            if weight_map and weight_map.get(name) != path:
                raise InputError(f"{path.name} holds {name}, which the index does not place there")
            entries[name] = entry
    if absent := [name for name in weight_map if name not in entries]:
        raise InputError(f"the index promises {_some(absent)}, absent from the shards it names")
    return entries


def _header(path: Path) -> dict[str, Entry]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Entry(path, tuple(part.get_shape()), _DTYPES.get(part.get_dtype()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        actual, expected = os.path.getsize(path), _expected_bytes(path)
        if expected is not None and expected != actual:
            detail = f"its header promises {expected} bytes and the file has {actual}"
        else:
            detail = f"{error} ({actual} bytes)"
        raise InputError(f"{path.name} is damaged: {detail}; download it again") from error


def _expected_bytes(path: Path) -> int | None:
    """File size that a safetensors header promises, or None when even the header cannot be read."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= 100_000_000:
            return None
        text = file.read(length)
    if len(text) < length:
        return 8 + length
    try:
        spans = [v["data_offsets"][1] for k, v in json.loads(text).items() if k != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None
    return 8 + length + max(spans, default=0)


def _compare(expected: dict[str, tuple[int, ...]], entries: dict[str, Entry], tied: bool) -> None:
    """Refuse missing, unexpected, misshapen and non-float tensors, naming the first few."""
    optional = {"lm_head.weight"} if tied else set()
    if missing := [name for name in expected if name not in entries and name not in optional]:
        raise InputError(f"the checkpoint lacks {_some(missing)}, which config.json asks for")
    extra = [name for name in entries if name not in expected and not _HARMLESS.search(name)]
    if extra:
        raise InputError(
            f"the checkpoint holds {_some(extra)}, which the model of config.json has not"
        )
    for name, shape in expected.items():
        entry = entries.get(name)
        if entry is None:
            continue
        if entry.shape != shape:
            raise InputError(
                f"tensor {name} has shape {_shape(entry.shape)}; config.json asks for "
                f"{_shape(shape)}"
            )
        if entry.dtype is None:
            raise InputError(
                f"tensor {name} is not stored as one of {', '.join(_DTYPES)}; already quantised?"
            )


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape) or "scalar"


def _some(names: list[str]) -> str:
    head = ", ".join(names[:3])
    return (
        f"{len(names)} tensor{'s' * (len(names) > 1)} ({head}{', ...' if len(names) > 3 else ''})"
    )
