"""Every CUDA kernel of the pack room, in the simulator: the CPU's bits, under every schedule."""

import pytest
import torch
from packed import CASES, GRIDS, SHAPES, content, same_bits

from distaya_ext.errors import InputError
from distaya_ext.ops import pack as P

# Every grid at a shape with ragged tiles; every shape with one grid.
RAGGED = [(grid, (70, 283)) for grid in GRIDS]
WORK = RAGGED + [((64, False, torch.float16), shape) for shape in SHAPES]


def same_parts(a, b) -> bool:
    return all((x is None and y is None) or same_bits(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("kind", "nm"), CASES)
def test_packed_and_read_bit_for_bit(simulator, kind, nm):
    for (group, symmetric, dtype), (rows, cols) in WORK:
        given = content(kind, rows, cols, group, symmetric, dtype, nm)
        packed = P.pack(*given, kind=kind, group=group, nm=nm)

        def again(given=given, group=group):
            return P.pack(*given, kind=kind, group=group, nm=nm).data

        assert torch.equal(simulator.same_always(again), packed.data), (group, symmetric, dtype)
        with simulator.use():
            assert same_parts(P.unpack(packed), given)
            assert same_bits(P.dequantize(packed), simulated := P.dequantize(packed))
        assert same_bits(P.dequantize(packed), simulated)


@pytest.mark.parametrize("out", P.SCALES, ids=str)
@pytest.mark.parametrize(("kind", "nm"), CASES)
def test_every_reader_under_every_schedule(simulator, kind, nm, out):
    for cols in (131, 256):  # rows that are no whole vectors, and rows that are
        given = content(kind, 70, cols, 64, False, torch.float32, nm)
        packed = P.pack(*given, kind=kind, group=64, nm=nm)
        indices = torch.tensor([[69, 0], [3, 3]])
        readers = [
            lambda p=packed: P.unpack(p),
            lambda p=packed: P.dequantize(p, out),
            lambda p=packed, i=indices: P.gather(p, i, out),
        ]
        for reader in readers:
            expected, found = reader(), simulator.same_always(reader)
            alone = isinstance(expected, torch.Tensor)
            assert same_parts([found] if alone else found, [expected] if alone else expected)


@pytest.mark.parametrize(("kind", "nm"), [c for c in CASES if c[0] not in ("int3", "int8")])
def test_survey_counts_the_same(simulator, kind, nm):
    for rows, cols in SHAPES:
        codes, _, zeros = content(kind, rows, cols, 32, False, torch.float32, nm)
        expected = P.survey(codes, zeros, 32)
        assert torch.equal(
            simulator.same_always(lambda c=codes, z=zeros: P.survey(c, z, 32)), expected
        )


def test_rows_from_the_middle(simulator):
    """Dequantizing a run of rows, as products with many tokens do."""
    given = content("int4-mask", 200, 300, 128, True, torch.bfloat16)
    packed = P.pack(*given, kind="int4-mask", group=128)
    spec = packed.format.spec()
    expected = P.pack_dequantize(packed.data, spec, 64, 136, torch.float16)
    found = simulator.same_always(
        lambda: P.pack_dequantize(packed.data, spec, 64, 136, torch.float16)
    )
    assert same_bits(found, expected)


@pytest.mark.parametrize("kind", ["int8", "int4-mask"])
def test_what_is_no_row_gives_nan(simulator, kind):
    packed = P.pack(*content(kind, 70, 200, 0), kind=kind, group=0)
    indices = torch.tensor([69, 70, -1])
    rows = simulator.same_always(lambda: P.gather(packed, indices))
    assert bool(rows[1:].isnan().all())
    assert torch.equal(rows[0], P.dequantize(packed)[69])


@pytest.mark.parametrize(
    ("kind", "nm"), [("int4", None), ("int4-2:4", None), ("int4-out", (2, 4)), ("int4-mask", None)]
)
def test_the_same_is_refused(simulator, kind, nm):
    codes, scales, zeros = content(kind, 130, 300, 32, False, torch.float32, nm)
    damage = [(codes, 99), (scales, float("nan")), (zeros, 77)]
    for part, value in damage:
        kept = part[70, 5].clone()
        part[70, 5] = value
        refuse_alike(simulator, codes, scales, zeros, kind, nm)
        part[70, 5] = kept
    if kind in ("int4-2:4", "int4-out"):
        codes[64:80, 8:24] = (zeros[64:80, :1] + 1) % 16  # all of them kept: too many everywhere
        refuse_alike(simulator, codes, scales, zeros, kind, nm)
        # Then too many behind one that is full, in the same 16 x 4 of int4-out.
        zero = int(zeros[64, 0])
        zeros[64:80] = codes[64:80] = zero
        codes[64:66, 8] = codes[68:71, 9] = codes[70, 8:11] = (zero + 1) % 16
        refuse_alike(simulator, codes, scales, zeros, kind, nm)


def refuse_alike(simulator, codes, scales, zeros, kind, nm) -> None:
    def sentence() -> str:
        with pytest.raises(InputError) as caught:
            P.pack(codes, scales, zeros, kind=kind, group=32, nm=nm)
        return str(caught.value)

    expected = sentence()
    for schedule in simulator.SCHEDULES:
        with simulator.use(), simulator.schedule(schedule):
            assert sentence() == expected, schedule
