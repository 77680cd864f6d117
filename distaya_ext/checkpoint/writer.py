"""Writing a model folder shard by shard, visible under its name only when complete."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..durable import as_os_error
from ..errors import InputError
from ..manifest import refresh
from . import readme
from .folder import contained, read_json

MARKER = "# distaya_ext recipe"  # first line of the recipe.yaml of every folder we wrote
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "README*")
# Where the old weights lay, what the old run found, what GPTQ writers repeat of config.json.
_RESULTS = (
    "results.json", "layers.json", "evaluation.json", "speed.json", "steps.json", "merge.json",
    "manifest.json",
)  # fmt: skip
_NOT_COPIED = ("*.index.json", *_RESULTS, "quantize_config.json", "quant_config.json")


class ShardWriter:
    """Collects tensors, writes a shard whenever shard_bytes are reached; finish() names them."""

    def __init__(self, folder: Path, shard_bytes: int = 1 << 30):
        self.folder = self.parts = folder  # parts: where shards lie until they have names
        self.shard_bytes = shard_bytes
        self.total_bytes = 0
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor (any device); it is held until its shard is written."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().to("cpu").contiguous()
        self._pending_bytes += size
        self.total_bytes += size

    def add_all(self, module: str, tensors: Mapping[str, torch.Tensor]) -> int:
        """Take the tensors of a module by suffix; returns their bytes."""
        for suffix, tensor in tensors.items():
            self.add(f"{module}.{suffix}", tensor)
        return sum(tensor.nbytes for tensor in tensors.values())

    def _flush(self) -> None:
        self._write_shard(self.parts / part_name(len(self._shards)))
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _write_shard(self, path: Path) -> None:
        """The tensors that wait, as a file."""
        write_tensors(self._pending, path)
        os.chmod(path, self.parts.stat().st_mode & 0o666)  # the library leaves its files private

    def _place_shard(self, index: int, name: str) -> None:
        """Give a shard its final name."""
        os.replace(self.parts / part_name(index), self.folder / name)

    def finish(self) -> list[Path]:
        """Write what is left, give the shards their final names and write the index if there are
        several.
        """
        if self._pending:
            self._flush()
        count = len(self._shards)
        names = (
            ["model.safetensors"]
            if count == 1
            else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
        for i, name in enumerate(names):
            self._place_shard(i, name)
        if count > 1:
            weight_map = {k: names[i] for i, keys in enumerate(self._shards) for k in keys}
            index = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": dict(sorted(weight_map.items())),
            }
            (self.folder / "model.safetensors.index.json").write_text(
                json.dumps(index, indent=2) + "\n"
            )
        return [self.folder / name for name in names]


def part_name(index: int) -> str:
    """The name of a shard while it is not known how many there will be."""
    return f"part-{index:05d}.safetensors"


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """A .safetensors file as transformers reads them. OSError where the disk is full."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise as_os_error(error, path) from None


def header_bytes(needs: Mapping[str, tuple[torch.dtype | None, tuple[int, ...]]]) -> int:
    """About the bytes of safetensors headers that describe tensors of these dtypes and shapes."""
    total, offset = 16, 0
    for name, (dtype, shape) in needs.items():
        start, size = offset, math.prod(shape) * (dtype.itemsize if dtype else 1)
        offset += size
        about = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, offset]}
        total += len(json.dumps({name: about}, separators=(",", ":"))) - 1
    return total


def write_config(
    source: Path,
    target: Path,
    quantization: dict[str, Any] | None,
    cut: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """config.json of the source folder with this quantization_config (None: without any).

    cut makes it that of another model, such as one of fewer layers.
    """
    config = cut(read_json(source, "config.json"))
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (target / "config.json").write_text(text, encoding="utf-8")


class Staging:
    """A hidden sibling of the output folder. publish() renames it into place; leaving removes it.

    Use as a context manager: whatever goes wrong inside, no half-written model is left at `out`.
    `model` is the future folder, `scratch` is for spilled activations.
    """

    def __init__(self, out: Path, *, overwrite: bool = False, source: Path | None = None):
        check_output(out, overwrite=overwrite, source=source)
        self.out = Path(os.path.abspath(out))  # also for "."; links in the way stay as they are
        self.overwrite, self._finished = overwrite, False
        self._made: list[Path] = []

    def __enter__(self) -> Staging:
        missing = [p for p in self.out.parents if not p.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made.append(folder)
        self.root = Path(tempfile.mkdtemp(dir=self.out.parent, prefix=f".{self.out.name}.partial-"))
        self.model, self.scratch = self.root / "model", self.root / "scratch"
        self.model.mkdir()
        self.scratch.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._finished:
            shutil.rmtree(self.root, ignore_errors=True)
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # holds the result, or what somebody else put there
                folder.rmdir()

    def publish(self) -> None:
        """Put the finished folder in the place of `out`; an older result is kept until that
        succeeded. What somebody else put there while the run was at work is not touched: InputError
        says where the result is.
        """
        try:
            check_output(self.out, overwrite=self.overwrite)
        except InputError as error:
            self._finished = True
            raise InputError(f"{error}; the finished model is kept in {self.model}") from None
        put_in_place(self.model, self.out, self.root / "replaced")


def put_in_place(model: Path, out: Path, aside: Path) -> None:
    """Rename the folder `model` to `out`. An older result goes to `aside`, and comes back when that
    fails; a README that was edited there is kept.
    """
    if out.exists():
        readme.keep_edited(out, model)
        refresh(model, readme.CARD)
        os.replace(out, aside)
    try:
        os.replace(model, out)
    except OSError:
        if aside.exists():
            os.replace(aside, out)
        raise


def check_output(out: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """Refuse an output that is or holds the model, is a file, lies where nothing can be written, or
    is a non-empty folder that is not ours.
    """
    if source is not None and source.resolve().is_relative_to(out.resolve()):
        same = source.resolve() == out.resolve()
        raise InputError(
            f"the output folder {out} {'is' if same else 'holds'} the model folder itself"
        )
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"the output {out} exists and is not a folder")
    above = next(p for p in Path(os.path.abspath(out)).parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"the output {out} cannot be made: {above} is no folder to write in")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise InputError(
            f"the output folder {out} is not empty; choose another, or --overwrite an older result"
        )
    if not is_ours(out):
        raise InputError(
            f"the output folder {out} was not written by distaya; it is not overwritten"
        )


def is_ours(out: Path) -> bool:
    """Whether we wrote the folder: its recipe.yaml begins with our mark."""
    recipe = out / "recipe.yaml"
    if recipe.is_symlink() or not recipe.is_file():
        return False
    with open(recipe, "rb") as file:
        return file.read(len(MARKER)) == MARKER.encode()


def check_companions(source: Path) -> list[str]:
    """Names of the config, tokenizer, licence and readme files; InputError for a link that leads
    out.
    """
    paths = {path for pattern in _COPIED for path in source.glob(pattern) if path.is_file()}
    names = [p.name for p in paths if not any(p.match(pattern) for pattern in _NOT_COPIED)]
    for name in names:
        contained(source, name)
    return sorted(names)


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy config, tokenizer, licence and readme files unchanged; returns their names. The source's
    own model card becomes README.source.md, since the folder gets one of its own.
    """
    copies = {name: readme.carried_as(source, name) for name in check_companions(source)}
    for name, carried in copies.items():
        if carried is not None:
            shutil.copyfile(source / name, target / carried)
    return sorted(carried for carried in copies.values() if carried is not None)
