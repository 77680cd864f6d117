"""What a packed matrix is: its format, its size, and the buffer with the two together.

Sizes follow csrc/pack/layout.h. ``ops.pack`` makes and reads the buffers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from distaya_ext.errors import InputError

KINDS = ("int4", "int3", "int8", "int4-2:4", "int4-mask", "int4-out")
SCALES = (torch.float32, torch.bfloat16, torch.float16)
GROUPS = (0, 32, 64, 128)
DENSE_BODY = {"int4": 4096, "int3": 3072, "int8": 8192, "int4-2:4": 3072}
TILE_ROWS, TILE_COLS, TAIL, MASK_BYTES, CHUNKS = 64, 128, 64, 1024, 128


def ceil_div(n: int, by: int) -> int:
    """n / by, rounded up."""
    return -(-n // by)


@dataclass(frozen=True)
class Format:
    """What a packed buffer means. Raises InputError (a ValueError) for fields that make no sense.

    kind one of KINDS; group columns that share a scale: 32, 64, 128, or 0 for the whole row;
    nm = (n, m) for int4-out only, m in 2, 4, 8, 16.
    """

    kind: str
    rows: int
    cols: int
    group: int = 128
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.bfloat16
    nm: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind is {self.kind!r} but must be one of {', '.join(KINDS)}")
        if self.rows < 0 or self.cols < 0:
            raise InputError(f"a packed matrix of {self.rows} x {self.cols} cannot be")
        if self.group not in GROUPS:
            raise InputError(f"group is {self.group} but must be 32, 64, 128 or 0 (the whole row)")
        if self.scale_dtype not in SCALES:
            raise InputError(
                f"scales are {self.scale_dtype} but must be float32, bfloat16 or float16"
            )
        if (self.nm is not None) != (self.kind == "int4-out"):
            takes = "needs nm=(n, m)" if self.nm is None else f"takes no nm, but got {self.nm}"
            raise InputError(f"kind {self.kind} {takes}")
        if self.nm is not None and not (
            self.nm[1] in (2, 4, 8, 16) and 0 < self.nm[0] < self.nm[1]
        ):
            raise InputError(f"nm is {self.nm} but must be (n, m), m in 2, 4, 8, 16 and 0 < n < m")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return {"int3": 3, "int8": 8}.get(self.kind, 4)

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return ceil_div(self.cols, self.group) if self.group else 1

    @property
    def tiles(self) -> int:
        """Tiles of 64 rows x 128 columns."""
        return ceil_div(self.rows, TILE_ROWS) * ceil_div(self.cols, TILE_COLS)

    def spec(self) -> list[int]:
        """The format as the kernels take it."""
        n, m = self.nm if self.nm is not None else (0, 0)
        dtype = SCALES.index(self.scale_dtype)
        kind = KINDS.index(self.kind)
        return [kind, self.rows, self.cols, self.group, int(self.symmetric), dtype, n, m]

    def _grid_bytes(self, rows: int) -> int:
        return rows * (self.scale_dtype.itemsize + (not self.symmetric))

    @property
    def record_bytes(self) -> int:
        """Bytes of a tile's record; of int4-mask, up to its kept codes."""
        grid = self._grid_bytes(TILE_ROWS) * (TILE_COLS // self.group if self.group else 0)
        if self.kind == "int4-mask":
            return grid + MASK_BYTES
        if self.nm is not None:
            return grid + MASK_BYTES + CHUNKS * (32 * self.nm[0] // self.nm[1])
        return grid + DENSE_BODY[self.kind]

    @property
    def offsets_bytes(self) -> int:
        """Bytes before the first record: int4-mask says where each record begins."""
        return ceil_div((self.tiles + 1) * 8, 64) * 64 if self.kind == "int4-mask" else 0

    @property
    def ending_bytes(self) -> int:
        """Bytes after the last record: the row section of group 0, and the tail."""
        rows = ceil_div(self.rows, TILE_ROWS) * TILE_ROWS
        return (0 if self.group else self._grid_bytes(rows)) + TAIL

    @property
    def nbytes(self) -> int | None:
        """Size of the buffer; None for int4-mask, whose size depends on content (nbytes_for)."""
        if self.kind == "int4-mask":
            return None
        return self.tiles * self.record_bytes + self.ending_bytes

    def nbytes_for(self, values: Iterable[int]) -> int:
        """Size of an int4-mask buffer whose tiles have this many bytes of kept codes, each.

        values: one number per tile, the first column of ``survey``.
        """
        records = sum(ceil_div(self.record_bytes + v, 16) * 16 for v in values)
        return self.offsets_bytes + records + self.ending_bytes

    def expected_bytes(self, density: float = 0.5) -> int:
        """Size of the buffer; for int4-mask the expected one when ``density`` of W is kept."""
        if self.nbytes is not None:
            return self.nbytes
        # A chunk of 16 x 4 weights keeps a binomial number of codes, the last of a row or column
        # one of fewer; an odd number takes half a byte more, and a record half of 15 bytes.
        codes = density * self.rows * self.cols
        for height, tall in ((16, self.rows // 16), (self.rows % 16, 1)):
            for width, across in ((4, self.cols // 4), (self.cols % 4, 1)):
                codes += tall * across * (1 - (1 - 2 * density) ** (height * width)) / 2
        records = round(self.tiles * (self.record_bytes + 7.5) + codes / 2)
        return self.offsets_bytes + records + self.ending_bytes


@dataclass(frozen=True)
class PackedWeight:
    """A packed matrix: uint8 [bytes] on CPU or CUDA, and what the bytes mean."""

    data: Tensor
    format: Format

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.data.numel()

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same matrix on another device."""
        return PackedWeight(self.data.to(device), self.format)
