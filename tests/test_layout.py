"""Packed buffers, byte for byte, against a model of csrc/pack/layout.h written from its words.

The model knows a tile as an array of bits with an owner each. It shares no code with the package.
"""

import itertools

import numpy as np
import pytest
import torch
from conftest import available_isas
from packed import CASES, content, same_bits

from distaya_ext.ops import machine
from distaya_ext.ops import pack as P

ROWS, COLS = 64, 128
BITS = {"int3": 3, "int8": 8}
LINE = 32 * 4  # words: 32 rows side by side for each of four quarters


def word(block: int, row: int, quarter: int) -> int:
    """Blocks of columns; in each two lines of 32 rows; in each the rows of every quarter."""
    return (2 * block + row // 32) * LINE + quarter * 32 + row % 32


def code_bits(kind: str, row: int, col: int) -> list[int]:
    """The bits of the body that hold a dense code, lowest first."""
    if kind == "int4":  # 8 columns to a word, in the order 0 2 4 6 1 3 5 7
        nibble = [0, 2, 4, 6, 1, 3, 5, 7].index(col % 8)
        first = 32 * word(col // 32, row, col % 32 // 8) + 4 * nibble
        return list(range(first, first + 4))
    if kind == "int8":  # 4 columns to a word
        first = 32 * word(col // 16, row, col % 16 // 4) + 8 * (col % 4)
        return list(range(first, first + 8))
    # int3: two low bits of 16 columns to a word, byte c of it holding columns c, c + 4, ...
    low = 32 * word(col // 64, row, col % 64 // 16) + 8 * (col % 4) + 2 * (col % 16 // 4)
    # Then a plane of third bits, 32 columns to a word, spread over its bytes in the same way.
    high = 32 * (512 + word(0, row, col // 32)) + 8 * (col % 4) + col % 32 // 4
    return [low, low + 1, high]


def kept_bits(row: int, group: int, slot: int) -> list[int]:
    """2:4: the nibble of a kept weight of a group of 4 columns; a word holds 4 groups."""
    first = 32 * word(group // 16, row, group // 4 % 4) + 4 * (group % 4) + 16 * slot
    return list(range(first, first + 4))


def meta_bits(row: int, group: int) -> list[int]:
    """2:4: which two are kept. Lane 4g + i, slab j: rows 4g + j and 32 + 4g + j, group i of 16."""
    block, sixteen, i = group // 16, group // 4 % 4, group % 4
    first = 32 * (512 + (4 * block + i) * 32 + row % 32) + 16 * (row // 32) + 4 * sixteen
    return list(range(first, first + 4))


def owners(kind: str) -> list[list[int]]:
    """Every slot of a body of fixed size, as the bits it owns."""
    every = itertools.product(range(ROWS), range(COLS))
    if kind != "int4-2:4":
        return [code_bits(kind, r, k) for r, k in every]
    groups = list(itertools.product(range(ROWS), range(COLS // 4)))
    kept = [kept_bits(r, g, slot) for r, g in groups for slot in (0, 1)]
    return kept + [meta_bits(r, g) for r, g in groups]


@pytest.mark.parametrize("kind", ["int4", "int3", "int8", "int4-2:4"])
def test_every_bit_of_a_body_has_one_owner(kind):
    bits = [bit for owned in owners(kind) for bit in owned]
    assert sorted(bits) == list(range(8 * P.DENSE_BODY[kind]))


def pairs(kept: np.ndarray) -> np.ndarray:
    """The two columns that 2:4 stores of each group [..., 4]: kept ones, filled from the left."""
    first = np.argsort(~kept, axis=-1, kind="stable")[..., :2]
    return np.sort(first, axis=-1)


def body_of(kind: str, codes: np.ndarray, zeros: np.ndarray, nm) -> bytes:
    """One tile: codes and zeros [64, 128]."""
    if kind in ("int4-mask", "int4-out"):
        return masked_body(codes, codes != zeros, nm)
    bits = np.zeros(8 * P.DENSE_BODY[kind], dtype=np.uint8)
    if kind == "int4-2:4":
        kept = pairs((codes != zeros).reshape(ROWS, -1, 4))
        for r, g in itertools.product(range(ROWS), range(COLS // 4)):
            low, high = kept[r, g]
            for slot, k in enumerate((low, high)):
                put(bits, kept_bits(r, g, slot), codes[r, 4 * g + k])
            put(bits, meta_bits(r, g), low + 4 * high)
    else:
        for r, k in itertools.product(range(ROWS), range(COLS)):
            put(bits, code_bits(kind, r, k), codes[r, k])
    return np.packbits(bits, bitorder="little").tobytes()


def put(bits: np.ndarray, where: list[int], value: int) -> None:
    for i, bit in enumerate(where):
        bits[bit] = int(value) >> i & 1


def masked_body(codes: np.ndarray, kept: np.ndarray, nm) -> bytes:
    """Chunks of 16 x 4: by 16 columns, then bands of rows, then the four of the 16 columns."""
    masks, values = b"", b""
    for k0, r0, k1 in itertools.product(range(0, COLS, 16), range(0, ROWS, 16), range(0, 16, 4)):
        rows, cols = slice(r0, r0 + 16), slice(k0 + k1, k0 + k1 + 4)
        chosen = kept[rows, cols].reshape(-1)
        masks += np.packbits(chosen, bitorder="little").tobytes()
        nibbles = [*codes[rows, cols].reshape(-1)[chosen].tolist(), 0]
        pairs_of = zip(nibbles[0:-1:2], nibbles[1::2], strict=True)
        packed = bytes(low + 16 * high for low, high in pairs_of)
        values += packed.ljust(32 * nm[0] // nm[1], b"\0") if nm else packed
    return masks + values


def padded(x: np.ndarray, rows: int, cols: int, fill) -> np.ndarray:
    out = np.full((rows, cols), fill, dtype=x.dtype)
    out[: x.shape[0], : x.shape[1]] = x
    return out


def buffer_of(codes, scales, zeros, kind: str, group: int, nm) -> bytes:
    """The whole buffer: offsets of int4-mask, records, row section, 64 bytes."""
    rows, cols = codes.shape
    tall, wide, symmetric = -(-rows // ROWS), -(-cols // COLS), zeros is None
    middle = 2 ** (BITS.get(kind, 4) - 1)
    size = scales.element_size()
    grid = scales.view({2: torch.int16, 4: torch.int32}[size]).numpy()
    zeros = np.full(scales.shape, middle, np.uint8) if symmetric else zeros.numpy()
    across = COLS // group if group else 1
    columns = wide * across if group else 1
    grid = padded(grid, tall * ROWS, columns, 0)
    zeros = padded(zeros, tall * ROWS, columns, middle)
    each = zeros.repeat(group, 1) if group else zeros.repeat(max(wide * COLS, 1), 1)
    full = np.where(padded(np.ones((rows, cols), bool), tall * ROWS, wide * COLS, False),
                    padded(codes.numpy(), tall * ROWS, wide * COLS, 0),
                    each[:, : wide * COLS])  # fmt: skip
    records = []
    for i, j in itertools.product(range(tall), range(wide)):
        r, k = slice(ROWS * i, ROWS * (i + 1)), slice(COLS * j, COLS * (j + 1))
        q = slice(across * j, across * (j + 1))
        record = b""
        if group:
            record = grid[r, q].T.tobytes() + (b"" if symmetric else zeros[r, q].T.tobytes())
        record += body_of(kind, full[r, k], each[r, k], nm)
        if kind == "int4-mask":
            record += bytes(-len(record) % 16)
        records.append(record)
    head = b""
    if kind == "int4-mask":
        start = -(-8 * (len(records) + 1) // 64) * 64
        ends = np.cumsum([start, *map(len, records)]).astype(np.int64)
        head = ends.tobytes().ljust(start, b"\0")
    section = b"" if group else grid.tobytes() + (b"" if symmetric else zeros.tobytes())
    return head + b"".join(records) + section + bytes(64)


@pytest.mark.parametrize(("kind", "nm"), CASES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_buffers_are_what_the_layout_says(kind, nm, symmetric):
    for i, group in enumerate((32, 64, 128, 0)):
        for rows, cols in [(2, 0), (1, 1), (70, 131)]:
            dtype = P.SCALES[(i + rows) % 3]
            given = content(kind, rows, cols, group, symmetric, dtype, nm, seed=i)
            want = buffer_of(*given, kind, group, nm)
            for isa in available_isas():
                with machine.use_isa(isa):
                    packed = P.pack(*given, kind=kind, group=group, nm=nm)
                assert packed.data.numpy().tobytes() == want, (group, rows, isa)


def test_the_model_tells_buffers_apart():
    codes, scales, zeros = content("int4", 3, 40, 32, False)
    want = P.pack(codes, scales, zeros, group=32).data.numpy().tobytes()
    for changed in (codes.clone(), scales.clone(), zeros.clone()):
        changed[2, 1] = changed[2, 1] * 0 + 3 if changed[2, 1] != 3 else 4
        parts = [changed if changed.shape == x.shape and changed.dtype == x.dtype else x
                 for x in (codes, scales, zeros)]  # fmt: skip
        assert buffer_of(*parts, "int4", 32, None) != want


def test_2_of_4_stores_every_set_of_kept_columns():
    """All 11 sets of at most two of four columns, in every place of a tile's metadata."""
    sets = [[i for i in range(4) if kept >> i & 1] for kept in range(16)]
    sets = [kept for kept in sets if len(kept) <= 2]
    codes = torch.full((64, 128), 8, dtype=torch.uint8)
    for row, group in itertools.product(range(64), range(32)):
        for k in sets[(row * 32 + group) % len(sets)]:
            codes[row, 4 * group + k] = (row + group + k) % 8
    scales = torch.ones(64, 1)
    packed = P.pack(codes, scales, kind="int4-2:4")
    assert packed.data.numpy().tobytes() == buffer_of(codes, scales, None, "int4-2:4", 128, None)
    assert torch.equal(P.unpack(packed)[0], codes) and same_bits(P.unpack(packed)[1], scales)
    meta = packed.data.numpy()[-64 - 1024 : -64]
    low, high = meta[:, None] >> np.array([0, 4]) & 3, meta[:, None] >> np.array([2, 6]) & 3
    assert (low < high).all()  # what mma.sp::ordered_metadata asks for
