"""What is timed: our packed kinds, and torch's own products of the same matrix beside them.

A subject owns as many copies of its weights as it takes to stream four times the last cache, and
every call takes the next one, so that weights come from memory as they do inside a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import UsageError
from ..ops import pack, sqgemm
from .shapes import Shape

GROUP = 128
_BLOCK = 512  # rows of random weights that are made; the rest repeats them
_PATTERN = {"int4-2:4": "columns", "int4-out": "rows", "int4-mask": "any"}
MODES = ("a8", "exact")  # int8 activations, activations as they are
# Relative error, Frobenius: bf16 results give 2e-3, int8 activations 1e-2 on normal ones.
_ERROR = {"a8": 4e-2, "exact": 1e-2}


@dataclass(frozen=True)
class Subject:
    """One way to multiply: call(x [tokens, cols], copy) -> y [tokens, rows]."""

    name: str
    nbytes: int  # of weights that one call reads
    work: str  # whose peak bounds it: int8, bf16 or fp32
    copies: Sequence[Any]
    call: Callable[[Tensor, Any], Tensor]
    kind: str | None = None  # None: a ruler
    mode: str | None = None


def copies_of(first: Any, nbytes: int, streamed: int, clone: Callable[[Any], Any]) -> list[Any]:
    """`first` and enough clones of it that together they are at least `streamed` bytes."""
    return [first, *(clone(first) for _ in range(-(-streamed // max(1, nbytes)) - 1))]


def kinds_of(shape: Shape, kinds: Sequence[str]) -> list[str]:
    """The head is stored in 8 bits only; UsageError for a kind that does not exist."""
    for kind in kinds:
        if kind not in pack.KINDS:
            raise UsageError(f"kind {kind!r} is none of {', '.join(pack.KINDS)}")
    return [kind for kind in kinds if not shape.head or kind == "int8"]


def random_codes(kind: str, rows: int, cols: int, device: torch.device) -> Tensor:
    """uint8 codes [rows, cols] that the kind can hold; half of the sparse ones are zero codes."""
    bits = {"int3": 3, "int8": 8}.get(kind, 4)
    random = torch.Generator(device).manual_seed(rows + cols)
    block = min(rows, _BLOCK)
    size = (block, cols)
    codes = torch.randint(0, 1 << bits, size, dtype=torch.uint8, generator=random, device=device)
    pattern = _PATTERN.get(kind)
    score = torch.rand(size, generator=random, device=device) if pattern else None
    if pattern == "columns" and score is not None:
        codes[_pruned_of_four(score)] = 8
    elif pattern == "rows" and score is not None:
        codes[_pruned_of_four(score.t().contiguous()).t()] = 8
    elif score is not None:
        codes[score < 0.5] = 8
    return codes.repeat(-(-rows // block), 1)[:rows].contiguous()


def _pruned_of_four(score: Tensor) -> Tensor:
    """True at the two lowest of every four along the last dimension; a ragged end is kept whole
    groups only, and pruned."""
    whole = score.shape[-1] // 4 * 4
    pruned = torch.ones_like(score, dtype=torch.bool)
    groups = score[..., :whole].unflatten(-1, (-1, 4))
    rank = groups.argsort(-1).argsort(-1)
    pruned[..., :whole] = (rank < 2).flatten(-2)
    return pruned


def nm_of(kind: str) -> tuple[int, int] | None:
    """The pattern of the one kind that names it."""
    return (2, 4) if kind == "int4-out" else None


def random_packed(shape: Shape, kind: str, device: torch.device) -> pack.PackedWeight:
    """Random weights, half of them pruned in the sparse kinds; the head has one scale per row."""
    codes = random_codes(kind, shape.rows, shape.cols, device)
    group = 0 if shape.head else GROUP
    groups = -(-shape.cols // group) if group else 1
    scales = torch.full((shape.rows, groups), 0.01, dtype=torch.bfloat16, device=device)
    return pack.pack(codes, scales, kind=kind, group=group, nm=nm_of(kind))


def ours(
    shape: Shape, kind: str, modes: Sequence[str], streamed: int, device: torch.device
) -> list[Subject]:
    """The kernels of one kind on random weights, one subject for each mode, sharing the copies."""
    packed = random_packed(shape, kind, device)

    def clone(weight: pack.PackedWeight) -> pack.PackedWeight:
        return pack.PackedWeight(weight.data.clone(), weight.format)

    copies = copies_of(packed, packed.nbytes, streamed, clone)
    found = []
    for mode in modes:
        exact = mode == "exact"
        work = "bf16" if exact else "int8"
        found.append(
            Subject(
                name=name_of(kind, mode),
                nbytes=packed.nbytes,
                work=work,
                copies=copies,
                call=lambda x, weight, exact=exact: sqgemm.linear(x, weight, exact=exact),
                kind=kind,
                mode=mode,
            )
        )
    return found


def name_of(kind: str, mode: str) -> str:
    """What our kernel of a kind is called in a mode, "a8" or "exact"."""
    return kind if mode == "a8" else f"{kind} exact"


def ruler_names(shape: Shape, kinds: Sequence[str], device: torch.device) -> list[str]:
    """torch's products that can take the shape and compete with a kind of ours; bf16 always."""
    rows, cols, gpu = shape.rows, shape.cols, device.type == "cuda"
    fits = {
        "torch bf16": True,
        "torch int4": any(k != "int8" for k in kinds) and cols % GROUP == 0 and rows % 32 == 0,
        "torch int8": "int8" in kinds and not gpu and rows % 32 == 0 and cols % 16 == 0,
        "torch 2:4": gpu and rows % 64 == 0 and cols % 64 == 0,
    }
    return [name for name, fit in fits.items() if fit]


def rulers(
    shape: Shape, kinds: Sequence[str], streamed: int, device: torch.device
) -> list[Subject]:
    """The subjects of ruler_names."""
    make = {
        "torch bf16": lambda: bf16(shape, streamed, device),
        "torch int4": lambda: int4(shape, streamed, device),
        "torch int8": lambda: int8(shape, streamed),
        "torch 2:4": lambda: two_four(shape, streamed, device),
    }
    return [make[name]() for name in ruler_names(shape, kinds, device)]


def random_dense(shape: Shape, device: torch.device) -> Tensor:
    """W [rows, cols] bf16 on a normal distribution."""
    random = torch.Generator(device).manual_seed(1)
    block = torch.randn(min(shape.rows, _BLOCK), shape.cols, generator=random, device=device)
    whole = block.mul_(0.02).to(torch.bfloat16).repeat(-(-shape.rows // len(block)), 1)
    return whole[: shape.rows].contiguous()


def bf16(shape: Shape, streamed: int, device: torch.device) -> Subject:
    """torch.nn.functional.linear: oneDNN on the CPU, cuBLAS on the GPU."""
    W = random_dense(shape, device)
    nbytes = W.numel() * 2
    copies = copies_of(W, nbytes, streamed, Tensor.clone)
    return Subject("torch bf16", nbytes, "bf16", copies, functional.linear)


def int4(shape: Shape, streamed: int, device: torch.device) -> Subject:
    """torch's W4A16 product, groups of 128, scales and zeros in bf16."""
    aten = torch.ops.aten
    random = torch.Generator(device).manual_seed(2)
    size = (shape.rows, shape.cols)
    groups = shape.cols // GROUP
    grid = torch.rand(groups, shape.rows, 2, generator=random, device=device).to(torch.bfloat16)
    if device.type == "cpu":
        codes = torch.randint(0, 16, size, dtype=torch.int32, generator=random)
        packed = aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        multiply = aten._weight_int4pack_mm_for_cpu
    else:
        pairs = torch.randint(
            0, 256, (size[0], size[1] // 2), dtype=torch.uint8, generator=random, device=device
        )
        packed = aten._convert_weight_to_int4pack(pairs, 8)
        multiply = aten._weight_int4pack_mm
    nbytes = shape.weights // 2 + grid.numel() * 2

    def clone(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair[0].clone(), pair[1].clone()

    copies = copies_of((packed, grid), nbytes, streamed, clone)
    call = lambda x, pair: multiply(x, pair[0], GROUP, pair[1])  # noqa: E731
    return Subject("torch int4", nbytes, "bf16", copies, call)


def int8(shape: Shape, streamed: int) -> Subject:
    """torch's W8A16 product on the CPU, one scale per row."""
    random = torch.Generator().manual_seed(3)
    block = min(shape.rows, _BLOCK)
    codes = torch.randint(-127, 128, (block, shape.cols), dtype=torch.int8, generator=random)
    codes = codes.repeat(-(-shape.rows // block), 1)[: shape.rows].contiguous()
    scales = torch.full((shape.rows,), 0.01, dtype=torch.bfloat16)
    nbytes = codes.numel() + 2 * shape.rows
    copies = copies_of(codes, nbytes, streamed, Tensor.clone)
    multiply = torch.ops.aten._weight_int8pack_mm
    return Subject("torch int8", nbytes, "bf16", copies, lambda x, c: multiply(x, c, scales))


def two_four(shape: Shape, streamed: int, device: torch.device) -> Subject:
    """torch's 2:4 product in bf16 (cuSPARSELt or CUTLASS, whichever torch takes)."""
    from torch.sparse import to_sparse_semi_structured

    W = random_dense(shape, device)
    W[_pruned_of_four(W.float().abs())] = 0
    nbytes = W.numel() * 2 // 2 + W.numel() // 8
    first = to_sparse_semi_structured(W)
    copies = copies_of(first, nbytes, streamed, lambda _: to_sparse_semi_structured(W))
    return Subject("torch 2:4", nbytes, "bf16", copies, functional.linear)


def error(subject: Subject, x: Tensor) -> float:
    """Relative difference (Frobenius) of ours to the fp32 product of some dequantised rows."""
    weight = subject.copies[0]
    rows = torch.arange(0, weight.format.rows, max(1, weight.format.rows // 256), device=x.device)
    W = pack.gather(weight, rows, torch.float32)
    true = x.float() @ W.t()
    got = subject.call(x, weight)[:, rows].float()
    return float((got - true).norm() / true.norm().clamp_min(1e-30))


def check(subject: Subject, x: Tensor) -> float:
    """error(), and RuntimeError when it is no rounding: a wrong kernel is not timed."""
    found = error(subject, x)
    limit = _ERROR[subject.mode or "exact"]
    if not found <= limit:
        size = f"{subject.copies[0].format.rows}x{subject.copies[0].format.cols}"
        raise RuntimeError(
            f"the kernel {subject.name} on {size} with {len(x)} tokens is off by {found:.3g} "
            f"(rounding explains {limit:g})"
        )
    return found
