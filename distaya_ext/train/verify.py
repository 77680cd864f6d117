"""Whether what was learnt fits a folder, and whether a written folder is what it must be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import InputError, UsageError
from .adapter import linear_shapes, read_adapter
from .learned import Learned, LowRank, is_pruned


def stays_beside(source: Checkpoint, name: str) -> bool:
    """Whether LoRA of this Linear cannot be merged, because its weights are quantised."""
    return _held_by(source, name) in source.stored


def _held_by(source: Checkpoint, name: str) -> str:
    """The module whose tensors a Linear multiplies with: the embedding, for a head tied to it."""
    table = source.architecture
    return table.embed if name == table.head and source.tied else name


def beside(source: Checkpoint, learned: Learned) -> dict[str, LowRank]:
    """LoRA that cannot be merged, rounded to the dtype of its matrix' scales, as it is stored."""
    found = {}
    for name, each in learned.low_rank.items():
        if stays_beside(source, name):
            where = _held_by(source, name)
            dtype = source.entries[f"{where}.{scale_name(source, where)}"].dtype
            found[name] = replace(each, A=each.A.to(dtype), B=each.B.to(dtype))
    return found


def check(source: Checkpoint, folder: Path, learned: Learned | None = None) -> int:
    """Compare a written folder with its source; returns how many modules were compared.

    Names, shapes, dtypes and formats, codes and zeros of quantised modules, zeros of pruned ones,
    and every tensor that did not learn must be the same. InputError with the first that is not.
    """
    learned = learned or Learned()
    fresh = open_checkpoint(folder, packed=True)
    compared = set()
    if fresh.stored != source.stored or sorted(fresh.entries) != sorted(source.entries):
        raise InputError(f"{folder.name} does not hold the tensors and formats of its source")
    linears = set(linear_shapes(source))
    for name, entry in source.entries.items():
        module, _, suffix = name.rpartition(".")
        old, new = source.read([name])[name], fresh.read([name])[name]
        if entry.dtype != new.dtype or entry.shape != tuple(new.shape):
            raise InputError(f"{name} changed its dtype or shape when it was written")
        quantised = module in source.stored and suffix != "bias"
        pattern = module in linears and suffix == "weight" and is_pruned(old)
        if quantised or pattern:
            compared.add(module)
        if quantised and module in learned.scales and suffix == scale_name(source, module):
            same = bool((old == 0).eq(new == 0).all())
        elif learns(source, learned, name):
            same = not pattern or bool((old == 0).eq(new == 0).all())
        else:
            same = torch.equal(old, new)
        if not same:
            raise InputError(f"{name} is not what it must be after writing; nothing was kept")
    _check_adapter(source, fresh, learned)
    return len(compared)


def _check_adapter(source: Checkpoint, fresh: Checkpoint, learned: Learned) -> None:
    wanted = beside(source, learned)
    held = read_adapter(fresh.adapter, fresh).low_rank if fresh.adapter is not None else {}
    same = held.keys() == wanted.keys() and all(
        torch.equal(held[n].A, e.A) and torch.equal(held[n].B, e.B) and held[n].alpha == e.alpha
        for n, e in wanted.items()
    )
    if not same:
        raise InputError("the adapter beside the weights is not what was learnt; nothing was kept")


def check_fits(source: Checkpoint, learned: Learned) -> None:
    """InputError unless all that was learnt has its place in the source."""
    shapes = linear_shapes(source)
    for name, each in learned.low_rank.items():
        if shapes.get(name) != (each.B.shape[0], each.A.shape[1]):
            raise InputError(f"LoRA of {name} does not fit the model in {source.folder.name}")
    for name, tensor in learned.tensors.items():
        entry = source.entries.get(name)
        if entry is None or entry.shape != tuple(tensor.shape):
            raise InputError(f"{name} does not fit the model in {source.folder.name}")
    for name in learned.scales:
        if name not in source.stored:
            raise InputError(f"{name} is not quantised in {source.folder.name}")
    if source.left_out:
        raise UsageError("a model without some of its layers is written first and trained then")
    if source.adapter is not None:
        before = read_adapter(source.adapter, source)
        lost = [name for name in before.low_rank if name not in learned.low_rank]
        if lost := lost + [name for name in before.tensors if name not in learned.tensors]:
            raise InputError(
                f"the adapter in {source.folder.name} holds {lost[0]}, which would be lost"
            )


def learns(source: Checkpoint, learned: Learned, name: str) -> bool:
    """Whether a dense tensor of the folder gets new values."""
    table = source.architecture
    module, _, suffix = name.rpartition(".")
    if source.tied and name == f"{table.head}.weight":  # some folders repeat the tied embedding
        return f"{table.embed}.weight" in learned.tensors
    return name in learned.tensors or (suffix == "weight" and module in learned.low_rank)


def scale_name(source: Checkpoint, module: str) -> str:
    """Suffix of the tensor that holds a quantised module's scales."""
    return "scales" if source.stored[module].scheme.encoding == "gptq" else "weight_scale"
