"""export(): a packed folder in another format, tensor by tensor, without solving anything again."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import (
    MARKER,
    Checkpoint,
    ShardWriter,
    Staging,
    check_companions,
    check_output,
    copy_companions,
    open_checkpoint,
    write_config,
)
from .checkpoint.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, contained
from .compress.budget import check_disk
from .errors import InputError, UsageError
from .finished import complete
from .formats import ModuleScheme, bits, compressed, gptq
from .resume.identity import model_identity

TARGETS = ("dense", "pack-quantized", "gptq")
_SHARD = 1 << 30


@dataclass(frozen=True)
class Exported:
    """What was written. notices: what the target could not hold as it was."""

    out: Path
    to: str
    modules: int
    bytes: int
    shards: int
    notices: list[str]


def export(
    folder: str | Path,
    out: str | Path,
    to: str,
    *,
    overwrite: bool = False,
    offline: bool = False,
    on_module: Callable[[int, int, str], None] | None = None,
) -> Exported:
    """Write the packed model in `folder` (ours, pack-quantized or GPTQ) to `out`.

    to         "dense": ordinary weights in the model's dtype; "pack-quantized": compressed-tensors,
               which stock transformers loads; "gptq": symmetric grids and those without a
               zero of 0 in the first version of the format, others as gptq_v2
    on_module  is called with (done, of, name) after each module

    Codes, scales and zeros are carried over bit for bit. LoRA that stays beside quantised weights
    goes into the dense ones, and as it is beside the others. One module is in memory at a time, and
    shards of at most 1 GiB. UsageError in one sentence for what the target cannot hold.
    """
    if to not in TARGETS:
        raise UsageError(f"target {to!r} is none of {', '.join(TARGETS)}")
    local = Path(folder).expanduser()
    check_output(Path(out), overwrite=overwrite, source=local if local.is_dir() else None)
    checkpoint = open_checkpoint(folder, offline=offline, packed=True)
    if checkpoint.scheme is None:
        raise InputError(f"{folder} is not quantised, so there is nothing to export")
    check_companions(checkpoint.folder)
    schemes, notices = _targets(checkpoint, to)
    updates = _updates(checkpoint, to, notices)
    with Staging(Path(out), overwrite=overwrite, source=checkpoint.folder) as staging:
        check_disk(staging.root, _size(checkpoint, schemes))
        writer = ShardWriter(staging.model, _SHARD)
        _write(checkpoint, schemes, updates, writer, on_module or (lambda done, of, name: None))
        shards = writer.finish()
        if checkpoint.adapter is not None and to != "dense":
            _copy_adapter(checkpoint.adapter, staging.model)
        copy_companions(checkpoint.folder, staging.model)
        write_config(checkpoint.folder, staging.model, _config(checkpoint, schemes, to))
        _write_recipe(checkpoint.folder, staging.model, to)
        complete(staging.model, "export", {"model": model_identity(checkpoint.folder)})
        staging.publish()
    size = writer.total_bytes
    return Exported(Path(out), to, len(checkpoint.stored), size, len(shards), notices)


def _targets(checkpoint: Checkpoint, to: str) -> tuple[dict[str, ModuleScheme | None], list[str]]:
    """What each quantised module becomes (None: dense), and what the user should know."""
    if to == "dense":
        return dict.fromkeys(checkpoint.stored), []
    architecture, notices = checkpoint.architecture, []
    found: dict[str, ModuleScheme | None] = {}
    offset = _gptq_offset(checkpoint) if to == "gptq" else 0
    for name, held in checkpoint.stored.items():
        if name in (architecture.embed, architecture.head):
            dtype = str(checkpoint.dtype).removeprefix("torch.")
            notices.append(f"{to} holds no quantised {name}: it becomes dense {dtype}")
            found[name] = None
            continue
        plain = ModuleScheme(held.scheme.bits, held.scheme.group, held.scheme.symmetric)
        rows, cols = held.rows, held.cols
        if plain.group >= cols:
            plain = dataclasses.replace(plain, group=0)
        if to == "gptq":
            fits = gptq.expresses(plain, rows, cols)
            plain = dataclasses.replace(plain, encoding="gptq", offset=offset)
        else:
            fits = compressed.expresses(plain, cols)
        if not fits:
            raise UsageError(
                f"{to} cannot hold {name}, {rows}x{cols} of {plain.bits} bits per "
                f"{plain.group or cols} inputs: it takes 4 or 8 bits and whole groups"
                + (" and words of 32 bits" if to == "gptq" else "")
            )
        found[name] = plain
    if all(scheme is None for scheme in found.values()):
        raise UsageError(f"nothing of this model can be stored as {to}; export it to dense")
    if to == "pack-quantized" and not all(s.symmetric for s in found.values() if s is not None):
        notices.append(compressed.ASYMMETRIC)
    return found, notices


def _updates(checkpoint: Checkpoint, to: str, notices: list[str]) -> dict[str, Any]:
    """LoRA beside the weights by module, where it is to be merged into dense ones."""
    if checkpoint.adapter is None:
        return {}
    from .train.adapter import read_adapter

    found = read_adapter(checkpoint.adapter, checkpoint)
    if to != "dense":
        notices.append(f"LoRA of {len(found.low_rank)} matrices stays beside {to}, in adapter/")
        return {}
    if checkpoint.tied and checkpoint.architecture.head in found.low_rank:
        raise UsageError("LoRA of the head cannot become dense: it is tied to the embedding")
    if found.tensors:
        raise UsageError(
            f"the adapter replaces {len(found.tensors)} tensors; distaya merge it first"
        )
    notices.append(
        f"LoRA of {len(found.low_rank)} matrices is merged into them; pruned ones among them have "
        "no zeros any more"
    )
    return found.low_rank


def _copy_adapter(adapter: Path, target: Path) -> None:
    """The files of an adapter, unchanged, into a folder of the same name."""
    (target / adapter.name).mkdir()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "README.md"):
        if (adapter / name).is_file():
            shutil.copyfile(contained(adapter, name), target / adapter.name / name)


def _gptq_offset(checkpoint: Checkpoint) -> int:
    """1 for the first version of GPTQ, 0 for gptq_v2: the first cannot say a zero of 0."""
    ends = (checkpoint.architecture.embed, checkpoint.architecture.head)
    for name, held in checkpoint.stored.items():
        if held.scheme.symmetric or name in ends:
            continue
        if held.scheme.encoding == "gptq":
            zeros = checkpoint.grid(name).zeros
        else:
            key = f"{name}.weight_zero_point"
            zeros = bits.unpack(checkpoint.read([key])[key].T, held.scheme.bits, held.rows)
        if bool((zeros == 0).any()):
            return 0
    return 1


def _size(checkpoint: Checkpoint, schemes: dict[str, ModuleScheme | None]) -> int:
    """Bytes of the tensors to write."""
    total = sum(checkpoint.entries[name].nbytes for name in _copied(checkpoint))
    for name, scheme in schemes.items():
        rows, cols = checkpoint.stored[name].rows, checkpoint.stored[name].cols
        dense = rows * cols * checkpoint.dtype.itemsize
        total += dense if scheme is None else scheme.nbytes(rows, cols, checkpoint.dtype)
    return total


def _copied(checkpoint: Checkpoint) -> list[str]:
    """Tensors that do not belong to a quantised matrix."""
    return [
        name
        for name in checkpoint.entries
        if name.endswith(".bias") or name.rpartition(".")[0] not in checkpoint.stored
    ]


def _write(
    checkpoint: Checkpoint,
    schemes: dict[str, ModuleScheme | None],
    updates: dict[str, Any],
    writer: ShardWriter,
    on_module: Callable[[int, int, str], None],
) -> None:
    for name in _copied(checkpoint):
        tensor = checkpoint.read([name])[name]
        module = name.removesuffix(".weight")
        if module in updates:
            tensor = (tensor.float() + updates[module].delta()).to(tensor.dtype)
        writer.add(name, tensor)
    for done, (name, scheme) in enumerate(schemes.items(), 1):
        grid = checkpoint.grid(name)
        if scheme is None and name in updates:
            W = grid.dense(torch.float32) + updates[name].delta()
            writer.add(f"{name}.weight", W.to(checkpoint.dtype))
        elif scheme is None:
            writer.add(f"{name}.weight", grid.dense(checkpoint.dtype))
        else:
            grid = dataclasses.replace(grid, group=scheme.group)
            writer.add_all(name, scheme.encode(grid))
        on_module(done, len(schemes), name)


def _config(
    checkpoint: Checkpoint, schemes: dict[str, ModuleScheme | None], to: str
) -> dict[str, Any] | None:
    if to == "dense":
        return None
    kept = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    return (gptq if to == "gptq" else compressed).write(kept, checkpoint.dense_linears(kept))


def _write_recipe(source: Path, target: Path, to: str) -> None:
    """The recipe of the folder, where it has one of ours: it marks the result as ours, too."""
    recipe = source / "recipe.yaml"
    ours = recipe.is_file() and recipe.read_bytes()[: len(MARKER)] == MARKER.encode()
    if ours:
        shutil.copyfile(recipe, target / "recipe.yaml")
    else:
        text = f"{MARKER}: none, these weights were quantised elsewhere and exported to {to}\n"
        (target / "recipe.yaml").write_text(text, encoding="utf-8")
