"""Writing what was learnt into a model folder, tensor by tensor, and proving what did not change.

dense weights       W + alpha / rank B A, or their new values, rounded once to the stored dtype
pruned weights      the same under their mask: what is 0 stays 0, what is not stays so
quantised weights   codes and zeros byte for byte; LoRA stays beside them as a PEFT adapter in
                    OUT/adapter, which distaya_ext attaches when it loads the folder
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import (
    MARKER,
    Checkpoint,
    ShardWriter,
    Staging,
    check_companions,
    check_finite,
    check_output,
    copy_companions,
    open_checkpoint,
)
from ..checkpoint.folder import ADAPTER
from ..compress.budget import check_disk
from ..errors import InputError
from ..finished import complete
from ..resume.identity import model_identity
from .adapter import linear_shapes, read_adapter
from .adapter_write import put_adapter
from .learned import Learned, LowRank, is_pruned, rounded
from .verify import beside, check, check_fits, learns, scale_name, stays_beside

_SHARD = 1 << 30
BESIDE = (
    "{count} quantised matrices keep their codes, and LoRA of {bytes} bytes stays beside them in "
    "adapter/: distaya_ext loads it with the model, AutoModel of transformers alone would leave it "
    "out (distaya export --to dense writes it into dense weights)"
)


@dataclass
class Merged:
    """What was written.

    merged    dense Linears that took their LoRA; masked: those of them that are pruned
    beside    quantised modules whose LoRA stays beside them, adapter_bytes in all
    replaced  dense tensors with new values; scales: quantised modules with new scales
    checked   modules whose codes or zeros were compared with the source's after writing
    bits_per_weight  of the Linears of all layers on disk, adapter included; before: the source's
    """

    out: Path
    merged: list[str] = field(default_factory=list)
    masked: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    scales: list[str] = field(default_factory=list)
    adapter_bytes: int = 0
    file_bytes: int = 0
    bits_per_weight: float = 0.0
    bits_per_weight_before: float = 0.0
    checked: int = 0
    notices: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """All of it but the path, for JSON."""
        found = asdict(self)
        del found["out"]
        return found


def merge_adapter(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    offline: bool = False,
) -> Merged:
    """Write a model folder (dense, pruned or quantised) with a PEFT LoRA of the same base in it.

    An adapter that the model has already stays: the two add up. InputError and UsageError in one
    sentence; see read_adapter and write_trained.
    """
    local = Path(model).expanduser()
    check_output(Path(out), overwrite=overwrite, source=local if local.is_dir() else None)
    source = open_checkpoint(model, offline=offline, packed=True)
    given = read_adapter(adapter, source)
    learned = Learned(dict(given.low_rank), given.tensors, masked=given.masked)
    notices = [] if given.masked else _lost(source, learned)
    held = source.adapter
    if held is not None and held.resolve() != Path(adapter).expanduser().resolve():
        before = read_adapter(held, source)
        for name, each in before.low_rank.items():
            also = learned.low_rank.get(name)
            learned.low_rank[name] = each if also is None else _added(each, also)
        learned.tensors.update({n: t for n, t in before.tensors.items() if n not in given.tensors})
    return write_trained(source, learned, out, overwrite=overwrite, notices=notices)


def write_trained(
    source: Checkpoint,
    learned: Learned,
    out: str | Path,
    *,
    overwrite: bool = False,
    notices: Sequence[str] = (),
    extra: Callable[[Path, Merged], None] | None = None,
) -> Merged:
    """Write the folder of `source` (opened with packed=True) with what was learnt in it.

    extra  is called with the folder and the account before `out` appears, to add files

    merge.json in the folder holds the account. After writing, the folder is opened again and
    compared with the source: codes, zeros, formats, patterns and whatever did not learn must be
    the same, or nothing appears. InputError when the two do not fit together.
    """
    out = Path(out)
    check_fits(source, learned)
    check_companions(source.folder)
    found = Merged(out, notices=list(notices))
    kept = beside(source, learned)
    with Staging(out, overwrite=overwrite, source=source.folder) as staging:
        check_disk(staging.root, source.nbytes + sum(each.nbytes for each in kept.values()))
        writer = ShardWriter(staging.model, _SHARD)
        for name in source.entries:
            writer.add(name, _new(source, learned, name, found))
        shards = writer.finish()
        copy_companions(source.folder, staging.model)
        if kept:
            found.beside = list(kept)
            found.adapter_bytes = put_adapter(staging.model / ADAPTER, kept)
            text = BESIDE.format(count=len(kept), bytes=found.adapter_bytes)
            found.notices.append(text)
            (staging.model / ADAPTER / "README.md").write_text(text + ".\n", encoding="utf-8")
        found.file_bytes = sum(path.stat().st_size for path in shards)
        found.checked = check(source, staging.model, learned)
        found.bits_per_weight_before = _bits(source, 0)
        found.bits_per_weight = _bits(source, sum(each.nbytes for each in kept.values()))
        _mark(source.folder, staging.model)
        text = json.dumps(found.summary(), indent=2, ensure_ascii=False) + "\n"
        (staging.model / "merge.json").write_text(text, encoding="utf-8")
        if extra is not None:
            extra(staging.model, found)
        complete(
            staging.model,
            "merge" if extra is None else "training",
            {"model": model_identity(source.folder)},
        )
        staging.publish()
    return found


def _new(source: Checkpoint, learned: Learned, name: str, found: Merged) -> Tensor:
    """A tensor of the written folder; notes in `found` what was done to it."""
    old = source.read([name])[name]
    module, _, suffix = name.rpartition(".")
    if module in source.stored and suffix != "bias":
        if module not in learned.scales or suffix != scale_name(source, module):
            return old
        found.scales.append(module)
        return _new_scales(source, learned, module, old)
    if not learns(source, learned, name):
        return old
    table = source.architecture
    tied_copy = source.tied and name == f"{table.head}.weight"
    value = learned.tensors.get(f"{table.embed}.weight" if tied_copy else name)
    low = None if tied_copy or suffix != "weight" else learned.low_rank.get(module)
    wide = (old if value is None else value).float()
    if low is not None:
        wide = wide + low.delta()
        found.merged.append(module)
    if value is not None:
        found.replaced.append(name)
    pruned = module in linear_shapes(source) and suffix == "weight" and is_pruned(old)
    if pruned:
        found.masked.append(module)
    new = rounded(wide, old, pruned)
    check_finite(name, new)
    return new.clone() if tied_copy else new


def _new_scales(source: Checkpoint, learned: Learned, module: str, old: Tensor) -> Tensor:
    new = learned.scales[module]
    if source.stored[module].scheme.encoding == "gptq":
        new = new.t()
    if new.shape != old.shape:
        raise InputError(f"the scales of {module} do not fit the model in {source.folder.name}")
    new = new.to(old.dtype).contiguous()
    check_finite(f"{module}.{scale_name(source, module)}", new)
    return new


def _bits(source: Checkpoint, added: int) -> float:
    """Bits on disk per weight of the Linears of all layers, `added` bytes counted with them."""
    linears = set(source.linears())
    size = sum(
        entry.nbytes
        for name, entry in source.entries.items()
        if name.rpartition(".")[0] in linears and not name.endswith(".bias")
    )
    weights = sum(r * c for n, (r, c) in linear_shapes(source).items() if n in linears)
    return 8 * (size + added) / weights


def _added(one: LowRank, two: LowRank) -> LowRank:
    """The sum of two updates, as one of the sum of their ranks."""
    A = torch.cat([one.A.float(), two.A.float()])
    B = torch.cat([one.B.float() * one.scaling, two.B.float() * two.scaling], dim=1)
    return LowRank(A, B, float(len(A)))


def _lost(source: Checkpoint, learned: Learned) -> list[str]:
    """A notice of how much of an adapter that knew no mask falls on pruned weights."""
    whole = lost = 0.0
    for name, low in learned.low_rank.items():
        if stays_beside(source, name):
            continue
        W = source.read([f"{name}.weight"])[f"{name}.weight"]
        if is_pruned(W):
            energy = low.delta().square()
            whole += float(energy.sum())
            lost += float(energy[W == 0].sum())
    if not whole:
        return []
    return [
        f"{100 * lost / whole:.0f} % of the squared update of pruned matrices fell on weights that "
        "are 0 and stay 0; an adapter trained here keeps all of its own"
    ]


def _mark(source: Path, target: Path) -> None:
    """The recipe of the folder, where it has one of ours: it marks the result as ours, too."""
    recipe = source / "recipe.yaml"
    if recipe.is_file() and recipe.read_bytes()[: len(MARKER)] == MARKER.encode():
        shutil.copyfile(recipe, target / "recipe.yaml")
    else:
        text = f"{MARKER}: none, this model was trained and not compressed here\n"
        (target / "recipe.yaml").write_text(text, encoding="utf-8")
