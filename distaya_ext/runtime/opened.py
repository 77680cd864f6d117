"""Opening a folder whose weights are packed: all that can be checked before one is read."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, locate, open_checkpoint
from ..checkpoint.folder import read_config, read_index, read_json
from ..checkpoint.reader import _check_depth, _compare, _config, _dtype, _headers
from ..formats import read_scheme
from ..models import describe
from ..models.skeleton import build_skeleton, check_table, is_tied
from .files import read_headers
from .place import check_held, place


@dataclass(frozen=True)
class Opened:
    """A checked folder. about is its quantization_config, None when the model is dense; dense_bytes
    is what all tensors take, or would if they were dense, in the dtype of the checkpoint.
    """

    checkpoint: Checkpoint
    about: dict[str, Any] | None
    dense_bytes: int


def open_model(model: str | Path, *, offline: bool = False) -> Opened:
    """Open a local folder or hub id, packed or dense, and check all of it short of the weights.

    InputError in one sentence.
    """
    folder = locate(model, offline=offline)
    if not _is_packed(folder):
        dense = open_checkpoint(folder)
        return Opened(dense, None, dense.nbytes)
    return _open_packed(folder)


def _is_packed(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False  # the strict reader tells what is missing
    raw = read_json(folder, "config.json")
    return any(raw.get(key) is not None for key in ("quantization_config", "compression_config"))


def _open_packed(folder: Path) -> Opened:
    raw = read_config(folder, packed=True)
    scheme = read_scheme(raw, f"config.json of {folder.name}")
    assert scheme is not None
    entries = _headers(folder, read_index(folder))
    plain = {k: v for k, v in raw.items() if k not in ("quantization_config", "compression_config")}
    config = _config(folder)
    _check_depth(config, entries)
    dtype = _dtype(plain, entries, describe(raw))
    del config.quantization_config  # only the hooks of transformers have a use for it
    skeleton = build_skeleton(config, dtype)
    check_table(skeleton, describe(config))
    tied = is_tied(skeleton, describe(config))
    dense_bytes = sum(parameter.numel() for parameter in skeleton.parameters()) * dtype.itemsize
    modules = place(skeleton, scheme, dtype)
    held = read_headers(sorted({entry.path for entry in entries.values()}))
    mine = check_held(modules, {name: (kind, shape) for name, (_, kind, shape) in held.items()})
    shapes = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
    rest = {name: entry for name, entry in entries.items() if name not in mine}
    _compare(shapes, rest, tied)
    checkpoint = Checkpoint(folder, config, dtype, entries)
    return Opened(checkpoint, copy.deepcopy(raw["quantization_config"]), dense_bytes)
