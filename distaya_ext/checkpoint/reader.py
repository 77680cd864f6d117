"""Strict reader over safetensors: everything promised is checked before any weight is used."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .. import dtypes
from ..errors import InputError, one_line
from ..finite import all_finite
from ..formats import Grid, Scheme, read_scheme
from ..models import Architecture, describe
from ..models.depth import cut_config, layers_left
from ..models.skeleton import build_skeleton, check_table, is_tied
from .compare import Stored, compare, stored_modules
from .entry import DTYPES, FLOATS, Entry, some
from .folder import ADAPTER, adapter_of, contained, locate, read_config, read_index

# Old files carry tables that the model computes by itself; they are neither used nor copied.
_HARMLESS = re.compile(r"rotary_emb\.(\w+_)?inv_freq$|\.masked_bias$|self_attn\.bias$")
_FINITE_BLOCK = 1 << 22  # elements tested at once, so that the test itself takes no memory


class Checkpoint:
    """A model folder whose headers agree with its config; tensors are mapped from disk when asked
    for.

    scheme says how the folder is quantised (None: it is not), stored what each quantised module
    holds, embedding and head included.
    """

    def __init__(
        self,
        folder: Path,
        config: Any,
        dtype: torch.dtype,
        entries: dict[str, Entry],
        scheme: Scheme | None = None,
        stored: dict[str, Stored] | None = None,
        tied: bool = False,
    ):
        self.folder = folder
        self.config = config
        self.dtype = dtype  # the dtype the model runs in
        self.architecture: Architecture = describe(config)
        self.entries = entries
        self.scheme = scheme
        self.stored: dict[str, Stored] = stored or {}
        self.tied = tied  # the head is the embedding
        self.source_layers = tuple(range(config.num_hidden_layers))  # their numbers in the folder
        self.left_out = 0  # bytes of the folder's tensors that are not among the entries
        self._finite: set[str] = set()

    @property
    def adapter(self) -> Path | None:
        """Folder of the LoRA that belongs to the model, which every loader must attach."""
        return adapter_of(self.folder)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def without(self, layers: Collection[int]) -> Checkpoint:
        """The checkpoint, which is not quantised, without these decoder layers: what stays is
        numbered anew. UsageError for layers that are not there and when none stays.
        """
        if not layers:
            return self
        left = layers_left(self.config.num_hidden_layers, sorted(layers))
        start, new = f"{self.architecture.layers}.", {str(old): i for i, old in enumerate(left)}
        entries: dict[str, Entry] = {}
        for name, entry in self.entries.items():
            index, _, rest = name.removeprefix(start).partition(".")
            if not name.startswith(start):
                entries[name] = entry
            elif index in new:
                entries[f"{start}{new[index]}.{rest}"] = replace(entry, name=entry.name or name)
        config = cut_config(self.config, left)
        found = Checkpoint(self.folder, config, self.dtype, entries, tied=self.tied)
        found.source_layers = tuple(self.source_layers[index] for index in left)
        found.left_out = self.left_out + self.nbytes - found.nbytes
        return found

    def dense_linears(self, packed: Collection[str]) -> list[str]:
        """Head and Linears that are not among `packed`: readers that go by class must skip them."""
        every = (self.architecture.head, *self.linears())
        return [name for name in every if name not in packed]

    def linears(self) -> list[str]:
        """Full names of the Linears of all layers, layer by layer."""
        return [
            f"{self.architecture.layers}.{layer}.{name}"
            for layer in range(self.config.num_hidden_layers)
            for name in self.architecture.linears()
        ]

    def read(
        self, names: Iterable[str], device: str | torch.device = "cpu"
    ) -> dict[str, torch.Tensor]:
        """Tensors by name, in their stored dtype. On the CPU they are views of the mapped file, but
        for those that begin between two of its elements, which no kernel takes: copies.

        The first read of a tensor tests it; NaN or infinity raises InputError with its name and
        row.
        """
        names = list(names)
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted({self.entries[name].path for name in names}):
            # Opened anew each time: a mapping that stays open keeps every page it touched resident.
            with safe_open(path, framework="pt") as file:
                for name in names:
                    entry = self.entries[name]
                    if entry.path == path:
                        held = entry.name or name
                        tensors[name] = self._checked(held, aligned(file.get_tensor(held))).to(
                            device
                        )
        return {name: tensors[name] for name in names}

    def read_rows(self, name: str, rows: slice) -> torch.Tensor:
        """Some rows of a tensor, in its stored dtype; NaN or infinity in them raises InputError."""
        entry = self.entries[name]
        with safe_open(entry.path, framework="pt") as file:
            part = aligned(file.get_slice(entry.name or name)[rows.start : rows.stop])
        if part.is_floating_point():
            check_finite(entry.name or name, part, rows.start, entry.shape[0])
        return part

    def grid(self, module: str) -> Grid:
        """Codes, scales and zeros of a quantised module (a key of `stored`), checked."""
        held = self.stored[module]
        suffixes = held.scheme.tensors(held.rows, held.cols, self.dtype)
        tensors = self.read(f"{module}.{suffix}" for suffix in suffixes)
        by_suffix = {name[len(module) + 1 :]: tensor for name, tensor in tensors.items()}
        return held.scheme.decode(by_suffix, held.rows, held.cols, module)

    def _checked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in self._finite and tensor.is_floating_point():
            check_finite(name, tensor)
            self._finite.add(name)
        return tensor


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a mapped file, or its copy where it begins between two of its elements."""
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def check_finite(name: str, tensor: torch.Tensor, first: int = 0, count: int | None = None) -> None:
    """InputError naming the tensor and its first row that holds NaN or infinity.

    first, count: which row of so many the tensor begins with, where it is a part of one.
    """
    if all_finite(tensor):
        return
    rows = tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1)
    step = max(1, _FINITE_BLOCK // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        finite = torch.isfinite(rows[start : start + step]).all(dim=1)
        if not bool(finite.all()):
            row = first + start + int((~finite).nonzero()[0])
            whole = len(rows) if count is None else count
            raise InputError(f"weight {name} holds NaN or infinity, first in row {row} of {whole}")


def open_checkpoint(
    model: str | Path, *, offline: bool = False, packed: bool = False
) -> Checkpoint:
    """Open a local folder or hub id and check all of it short of reading the weights.

    Config, shard names, presence and size of shards, and name, shape and dtype of every tensor
    against the model that transformers builds from the config and, with packed=True, what the
    config says of quantised modules; without it a quantised model is refused. Raises InputError
    with one sentence.
    """
    folder = locate(model, offline=offline)
    raw = read_config(folder, packed=packed)
    if not packed and adapter_of(folder) is not None:
        raise InputError(
            f"{folder.name} has an adapter beside its weights, which would be lost; write it into "
            f"them first (distaya merge {folder.name} {folder.name}/{ADAPTER} --out OUT)"
        )
    scheme = read_scheme(raw)
    weight_map = read_index(folder)
    entries = _headers(folder, weight_map)
    config = _config(folder)
    _check_depth(config, entries)
    dtype = _dtype(raw, entries, describe(raw))
    skeleton = build_skeleton(config, dtype)
    check_table(skeleton, describe(config))
    tied = is_tied(skeleton, describe(config))
    stored = stored_modules(skeleton, describe(config), scheme, tied)
    entries = {name: entry for name, entry in entries.items() if not _HARMLESS.search(name)}
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    unused = compare(expected, entries, stored, tied)
    checkpoint = Checkpoint(folder, config, dtype, entries, scheme, stored, tied)
    head = f"{checkpoint.architecture.head}.weight"
    if tied and checkpoint.architecture.embed in stored and head in entries:
        raise InputError(
            f"the checkpoint holds {head} beside the quantised embedding it is tied to"
        )
    for name in unused:  # some writers of GPTQ give every Linear a bias
        if bool(checkpoint.read([name])[name].any()):
            raise InputError(f"the checkpoint holds {name}, which the model of config.json has not")
        del entries[name]
    return checkpoint


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers and its validators raise many kinds here
        raise InputError(
            f"config.json of {folder.name} is not usable: {one_line(error)}"
        ) from error


def _check_depth(config: Any, entries: dict[str, Entry]) -> None:
    """Refuse a wrong number of layers, or wrong numbers, before a model of that depth is built."""
    start = f"{describe(config).layers}."
    names = (name[len(start) :].partition(".")[0] for name in entries if name.startswith(start))
    held = sorted({int(name) for name in names if name.isdecimal()})
    asked = config.num_hidden_layers
    if asked != len(held) or not held:
        raise InputError(
            f"config.json asks for {asked} decoder layers; the checkpoint holds {len(held)}"
        )
    if held != list(range(asked)):  # transformers would make up the ones in the gaps
        gaps = [index for index in range(asked) if index not in held]
        raise InputError(
            f"config.json asks for decoder layers 0 to {asked - 1}; the checkpoint lacks "
            f"{_numbers(gaps)} and holds {_numbers(held[asked - len(gaps) :])} instead: layers "
            "were taken out and those that stayed not numbered anew"
        )


def _numbers(found: list[int]) -> str:
    return ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")


def _dtype(raw: dict, entries: dict[str, Entry], architecture: Architecture) -> torch.dtype:
    name = raw.get("dtype") or raw.get("torch_dtype")
    if name is not None:
        if not isinstance(name, str) or name not in dtypes.FLOATS:
            raise InputError(
                f"config.json names dtype {name!r}; one of {', '.join(dtypes.FLOATS)} is needed"
            )
        return dtypes.FLOATS[name]
    embed = entries.get(f"{architecture.embed}.weight")
    known = embed is not None and embed.dtype in FLOATS
    return embed.dtype if known else torch.float32


def _headers(folder: Path, weight_map: dict[str, Path]) -> dict[str, Entry]:
    paths = sorted(set(weight_map.values())) or [contained(folder, "model.safetensors")]
    entries: dict[str, Entry] = {}
    for path, header in zip(paths, _read_headers(paths), strict=True):
        for name, entry in header.items():
            if weight_map and weight_map.get(name) != path:
                raise InputError(f"{path.name} holds {name}, which the index does not place there")
            entries[name] = entry
    if absent := [name for name in weight_map if name not in entries]:
        raise InputError(f"the index promises {some(absent)}, absent from the shards it names")
    return entries


def _read_headers(paths: list[Path]) -> list[dict[str, Entry]]:
    """read_header of every shard; all that are damaged are told at once."""
    found, damaged = [], []
    for path in paths:
        try:
            found.append(read_header(path))
        except InputError as error:
            damaged.append(error)
    if len(damaged) == 1:
        raise damaged[0]
    if damaged:
        raise InputError(
            f"{len(damaged)} of {len(paths)} shards are damaged: {'; '.join(map(str, damaged))}"
        )
    return found


def read_header(path: Path) -> dict[str, Entry]:
    """What one shard holds, by name. InputError when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Entry(path, tuple(part.get_shape()), DTYPES.get(part.get_dtype()))
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
        return 8 + length + max(spans, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return None
