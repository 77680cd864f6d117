"""Every door of the compiled module, every tensor that it takes: what cannot be borrowed is refused
in one sentence, and nothing has been written by then.

The doors are found by running every op once (tests/every_op.py) with the module's functions
watched, so that a new op is covered as soon as it has its case there.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from every_op import CASES, same
from torch import Tensor
from torch._subclasses import FakeTensorMode

from distaya_ext import _C
from distaya_ext.ops import machine

# What takes no tensor, or only looks at its sizes.
NO_DOORS = {"isa", "best_isa", "set_isa", "threads", "peak", "cuda_status", "touch", "plant"}
NO_DOORS |= {"sqgemm_fragments", "sqgemm_cuda_most_tokens", "sqgemm_has_wgmma", "sqgemm_work"}
NO_DOORS |= {"cholesky_work", "mask_keep_work", "mask_score_work", "divergence_work"}
NO_DOORS |= {"obs_work", "refit_work"}
# Scratch without a layout: any bytes do.
SCRATCH = {"obs": {8}, "refit": {9}, "divergence": {8}, "cholesky_": {5}}

# Shapes that the op can serve after all: no rows to solve, other features, tokens of any shape.
SERVED = {("solve_", 0, "empty"), ("dass_balance", 0, "an element less")}
SERVED |= {("dass_balance", 4, "empty"), ("sqgemm_linear", 0, "a dimension more")}
SERVED |= {("sqgemm_glu", 0, "a dimension more"), ("pack_dequantize", 3, "empty")}
SERVED |= {("sqgemm_linear", 7, "a dimension more"), ("sqgemm_glu", 10, "a dimension more")}
SERVED |= {("read", 0, n) for n in ("no dimension", "a dimension more", "an element less", "empty")}

Damage = Callable[[Tensor], Tensor | None]  # None: does not apply


def record() -> dict[str, tuple]:
    """The arguments of a healthy call of every door."""
    seen: dict[str, tuple] = {}
    doors = {
        name: getattr(_C, name)
        for name in dir(_C)
        if callable(getattr(_C, name)) and not isinstance(getattr(_C, name), type)
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, door in doors.items():

            def watched(*args: Any, _name: str = name, _door: Any = door) -> Any:
                given = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
                optional = sum(a is None for a in seen.get(_name, ()))
                if _name not in seen or sum(a is None for a in given) < optional:
                    seen[_name] = given
                return _door(*args)

            patch.setattr(_C, name, watched)
        for make in CASES.values():
            make(0, 1)()
        machine.read(torch.zeros(100, dtype=torch.uint8))
    assert set(doors) - set(seen) <= NO_DOORS, "an op without its case in every_op.py"
    return {name: args for name, args in seen.items() if name not in NO_DOORS}


DOORS = record()
TENSORS = [(d, i) for d, args in DOORS.items() for i, a in enumerate(args) if isinstance(a, Tensor)]


def apart(t: Tensor) -> Tensor | None:
    """The same values, every second element of a row."""
    if t.numel() < 2 or t.dim() == 0 or t.shape[-1] < 2:
        return None
    wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


def turned(t: Tensor) -> Tensor | None:
    """The same values, column by column."""
    if t.dim() < 2 or min(t.shape[-2:]) < 2:
        return None
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def shifted(t: Tensor) -> Tensor | None:
    """The same values, one byte off."""
    if t.element_size() == 1 or t.numel() == 0:
        return None
    memory = bytearray(t.numel() * t.element_size() + 64)
    moved = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=1)
    assert moved.data_ptr() % t.element_size()
    return moved.copy_(t.reshape(-1)).view(t.shape)


def tracked(t: Tensor) -> Tensor | None:
    return t.clone().requires_grad_() if t.is_floating_point() else None


def fake(t: Tensor) -> Tensor:
    with FakeTensorMode():
        return torch.empty(t.shape, dtype=t.dtype)


def expanded(t: Tensor) -> Tensor | None:
    """One element everywhere, by strides of zero."""
    return t.reshape(-1)[:1].expand(t.shape) if t.numel() > 1 else None


DAMAGES: dict[str, tuple[Damage, str]] = {
    "every second element": (apart, "not contiguous; pass .*contiguous()"),
    "columns first": (turned, "not contiguous; pass .*contiguous()"),
    "zero strides": (expanded, "not contiguous; pass .*contiguous()"),
    "one byte off": (shifted, "is not aligned to [248] bytes"),
    "requires grad": (tracked, "requires grad.*detach"),
    "meta": (lambda t: t.to("meta"), "no memory a kernel could read"),
    "sparse": (lambda t: t.to_sparse() if t.dim() else None, "no memory a kernel could read"),
    "fake": (lambda t: fake(t) if t.numel() else None, "has no data"),
    "complex": (lambda t: t.to(torch.complex64), "type code 5"),
    "int16": (lambda t: t.to(torch.int16), "no kernel takes .*16 bits"),
    "another dtype": (
        lambda t: t.to(torch.float64 if t.dtype == torch.int64 else torch.int64),
        "must|needs",
    ),
    "no dimension": (lambda t: torch.zeros((), dtype=t.dtype) if t.dim() else None, r"\[\]|dim"),
    "a dimension more": (lambda t: t[None], "dimensions|must|shape"),
    "an element less": (lambda t: t.reshape(-1)[1:] if t.dim() == 1 else t[..., 1:].clone(), ""),
    "empty": (lambda t: t[:0].clone() if t.dim() and t.numel() else None, ""),
}


def attempt(door: str, index: int, bad: Any, error: type[Exception]) -> str:
    """The sentence of the error, having seen that nothing was written."""
    args = [a.clone() if isinstance(a, Tensor) else a for a in DOORS[door]]
    args[index] = bad
    before = [a.clone() for i, a in enumerate(args) if isinstance(a, Tensor) and i != index]
    with pytest.raises(error) as caught:
        getattr(_C, door)(*args)
    after = [a for i, a in enumerate(args) if isinstance(a, Tensor) and i != index]
    assert same(after, before)
    return str(caught.value)


@pytest.mark.parametrize(("door", "index"), TENSORS)
def test_what_cannot_be_borrowed_is_refused(door, index):
    for name, (damage, words) in DAMAGES.items():
        if (door, index, name) in SERVED or (index in SCRATCH.get(door, ()) and not words):
            continue
        bad = damage(DOORS[door][index])
        if bad is None:
            continue
        sentence = attempt(door, index, bad, ValueError)
        assert "\n" not in sentence and re.search(words, sentence), (name, sentence)


@pytest.mark.parametrize(("door", "index"), TENSORS)
def test_what_is_no_tensor_is_refused(door, index):
    """Neither other owners of memory, which speak DLPack too, nor None where something must be."""
    for other in (DOORS[door][index].float().numpy(), [1.0], "tensor", 3):
        attempt(door, index, other, TypeError)


def test_served_shapes_are_served():
    """Or the list above would hide a door that refuses nothing."""
    for door, index, name in SERVED:
        args = [a.clone() if isinstance(a, Tensor) else a for a in DOORS[door]]
        args[index] = DAMAGES[name][0](args[index])
        if door == "dass_balance" and index == 4:
            continue  # an order of no neurons
        getattr(_C, door)(*args)


def test_negative_strides_do_not_reach_us():
    """torch has none: what numpy turned around is refused where it would become a tensor."""
    flipped = np.arange(12, dtype=np.float32)[::-1]
    with pytest.raises(ValueError, match="negative"):
        torch.from_numpy(flipped)
    with pytest.raises(TypeError):
        machine.touch(*[flipped] * 4)


def test_a_misaligned_tensor_of_a_file_is_copied(tmp_path):
    """safetensors maps files as they are: bytes before a tensor may shift it between elements."""
    from safetensors import safe_open

    from distaya_ext.checkpoint import aligned

    header = b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},'
    header += b'"b":{"dtype":"BF16","shape":[4],"data_offsets":[3,11]}}'
    header += b" " * (-len(header) % 8)
    file = tmp_path / "odd.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(3) + b"\x80\x3f" * 4)
    with safe_open(file, framework="pt") as opened:
        odd = opened.get_tensor("b")
        assert odd.data_ptr() % 2 == 1
        assert aligned(odd).data_ptr() % 2 == 0 and aligned(odd).tolist() == [1.0] * 4
        assert aligned(opened.get_tensor("a")).data_ptr() == opened.get_tensor("a").data_ptr()
