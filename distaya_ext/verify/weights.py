"""The numbers of a folder, one matrix in memory at a time: finite, in range, in their pattern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..checkpoint.compare import Stored
from ..errors import InputError
from ..formats import Grid
from .findings import Findings
from .plan import Expected

_BLOCK = 1 << 22  # weights looked at once


@dataclass(frozen=True)
class Groups:
    """How many weights of any m neighbours are kept: too_many groups hold more than n, the first
    in `row` (of the matrix, or of its transpose) as group `group`."""

    too_many: int
    row: int
    group: int


def check_dense(checkpoint: Checkpoint, plan: Mapping[str, Expected], found: Findings) -> None:
    """Tensors that belong to no quantised matrix."""
    packed = {f"{name}." for name in checkpoint.stored}
    for name in checkpoint.entries:
        module, _, suffix = name.rpartition(".")
        if f"{module}." in packed and suffix != "bias":
            continue
        found.looked["tensors"] += 1
        try:
            tensor = checkpoint.read([name])[name]
        except InputError as error:
            found.add("finite", name, str(error))
            continue
        if suffix == "weight" and module in plan:
            _check_kept(module, tensor, plan[module], found)
    _check_tied(checkpoint, found)


def check_packed(checkpoint: Checkpoint, plan: Mapping[str, Expected], found: Findings) -> None:
    """Quantised matrices: what decoding refuses, bits that must be 0, and patterns."""
    for name, held in checkpoint.stored.items():
        found.looked["quantised matrices"] += 1
        try:
            suffixes = held.scheme.tensors(held.rows, held.cols, checkpoint.dtype)
            full = checkpoint.read(f"{name}.{suffix}" for suffix in suffixes)
            tensors = {key[len(name) + 1 :]: tensor for key, tensor in full.items()}
            for suffix in spare_bits(held, tensors):
                found.add("codes", f"{name}.{suffix}", "bits past its last value are set")
            grid = held.scheme.decode(tensors, held.rows, held.cols, name)
        except InputError as error:
            found.add("codes", name, str(error))
            continue
        kept = grid.kept()
        _check_bitmask(name, held, tensors, kept, grid, found)
        _check_kind(name, held, kept, found)
        if name in plan:
            plan[name].check_scheme(name, held.scheme, held.cols, found)
            _check_kept(name, kept, plan[name], found)


def spare_bits(held: Stored, tensors: Mapping[str, Tensor]) -> list[str]:
    """Suffixes of tensors in which bits past the last value of a row or column are not 0."""
    scheme, rows, cols = held.scheme, held.rows, held.cols
    ends = {
        "weight_packed": (1, cols),
        "weight_zero_point": (0, rows),
        "qweight": (0, cols),
        "qzeros": (1, rows),
    }
    bad = []
    for suffix, (dim, count) in ends.items():
        used = count * scheme.bits % 32
        if suffix in tensors and used:
            last = tensors[suffix].select(dim, tensors[suffix].shape[dim] - 1).long() & 0xFFFFFFFF
            if bool((last >> used).any()):
                bad.append(suffix)
    return bad


def too_many_kept(kept: Tensor, n: int, m: int, along: str = "inputs") -> Groups | None:
    """Where more than n of m neighbours are not zero; kept [rows, cols] bool or weights. along:
    inputs (columns) or outputs (rows). None: nowhere. A last shorter group may keep n, too.
    """
    W = kept if along == "inputs" else kept.t()
    step = max(1, _BLOCK // max(1, W.shape[1]))
    total, first = 0, None
    for start in range(0, W.shape[0], step):
        part = torch.nn.functional.pad((W[start : start + step] != 0), (0, -W.shape[1] % m))
        over = part.view(len(part), -1, m).sum(dim=2, dtype=torch.int16) > n
        count = int(over.sum())
        if count and first is None:
            row, group = (int(i) for i in over.nonzero()[0])
            first = (start + row, group)
        total += count
    return None if first is None else Groups(total, *first)


def _check_kept(name: str, W: Tensor, expected: Expected, found: Findings) -> None:
    """The pattern and the number of zeros that the run wrote down."""
    for part, n, m, along in expected.parts(W):
        found.looked["patterns"] += 1
        bad = too_many_kept(part, n, m, along)
        if bad is not None:
            found.add(
                "pattern",
                name,
                f"{bad.too_many} groups of {m} along its {along} keep more than {n}, first group "
                f"{bad.group} of {'row' if along == 'inputs' else 'column'} {bad.row}",
            )
    zeros = W.numel() - int(W.count_nonzero())
    expected.check_zeros(name, zeros, W.numel(), found)


def _check_kind(name: str, held: Stored, kept: Tensor, found: Findings) -> None:
    """Kernel layouts that config.json names can hold only their own pattern."""
    scheme = held.scheme
    if scheme.kind == "int4-2:4":
        n, m, along = 2, 4, "inputs"
    elif scheme.nm is not None:
        (n, m), along = scheme.nm, "outputs"
    else:
        return
    bad = too_many_kept(kept, n, m, along)
    if bad is not None:
        found.add(
            "pattern",
            name,
            f"{bad.too_many} groups of {m} keep more than {n}, which its kind {scheme.kind} "
            "cannot hold",
        )


def _check_bitmask(
    name: str,
    held: Stored,
    tensors: Mapping[str, Tensor],
    kept: Tensor,
    grid: Grid,
    found: Findings,
) -> None:
    """Every kept weight of a bitmask is another than 0, and what is left of its last byte is 0."""
    if held.scheme.encoding != "bitmask":
        return
    values = tensors["weight_values"]
    marked = int(_ones(tensors["weight_mask"]))
    if marked != int(kept.count_nonzero()):
        less = marked - int(kept.count_nonzero())
        found.add("codes", name, f"{less} of the {marked} weights that its mask keeps are 0")
    if marked % 2 and int(values[-1]) >> 4:
        found.add("codes", f"{name}.weight_values", "bits past its last value are set")


def _ones(mask: Tensor) -> int:
    table = torch.tensor([bin(byte).count("1") for byte in range(256)])
    return int((torch.bincount(mask.flatten().int(), minlength=256) * table).sum())


def _check_tied(checkpoint: Checkpoint, found: Findings) -> None:
    embed, head = (
        f"{path}.weight" for path in (checkpoint.architecture.embed, checkpoint.architecture.head)
    )
    if not checkpoint.tied or embed not in checkpoint.entries or head not in checkpoint.entries:
        return
    try:
        pair = checkpoint.read([embed, head])
    except InputError:  # said already
        return
    if not torch.equal(pair[embed], pair[head]):
        found.add("tied", head, f"config.json ties it to {embed}, and the two differ")
