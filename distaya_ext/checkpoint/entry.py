"""What the header of a shard tells of one tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

FLOATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_INTEGERS = {torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8"}
DTYPES = {code: dtype for dtype, code in {**FLOATS, **_INTEGERS}.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint: its file, shape and stored dtype (from the header only).

    name is what the file calls it, None where that is what everyone calls it.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: a type that no model we read has
    name: str | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (self.dtype.itemsize if self.dtype else 1)


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape as messages show it."""
    return "x".join(str(size) for size in shape) or "scalar"


def some(names: Sequence[str], what: str = "tensor") -> str:
    """How many there are, and the first of them: "4 modules (a, b, c, ...)"."""
    head = ", ".join(name[:80] for name in names[:3])
    dots = ", ..." if len(names) > 3 else ""
    return f"{len(names)} {what}{'s' * (len(names) > 1)} ({head}{dots})"
