"""Packed matrices: exact inverses, exact floats, predicted bytes, and sentences for bad content."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed import CASES, GRIDS, SHAPES, content, same_bits, wide

from distaya_ext.ops import machine
from distaya_ext.ops import pack as P

BF16 = torch.bfloat16

examples = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def floats(codes, scales, zeros, packed, dtype):
    """What dequantize must give, bit for bit: one rounding to fp32, one to dtype."""
    form = packed.format
    zero = 2.0 ** (form.bits - 1)
    if zeros is not None:
        zero = wide(zeros, form.group, form.cols).float()
    return (wide(scales, form.group, form.cols).float() * (codes.float() - zero)).to(dtype)


# ---- inverses ----


@pytest.mark.parametrize(("kind", "nm"), CASES)
def test_unpack_inverts_pack(isa, kind, nm):
    for (group, symmetric, dtype), (rows, cols) in itertools.product(GRIDS, SHAPES):
        codes, scales, zeros = content(kind, rows, cols, group, symmetric, dtype, nm)
        packed = P.pack(codes, scales, zeros, kind=kind, group=group, nm=nm)
        again = P.unpack(packed)
        assert torch.equal(again[0], codes), (group, symmetric, rows, cols)
        assert same_bits(again[1], scales)
        assert again[2] is None if symmetric else torch.equal(again[2], zeros)


@given(data=st.data(), case=st.sampled_from(CASES), grid=st.sampled_from(GRIDS))
@examples
def test_any_content_survives(isa, data, case, grid):
    (kind, nm), (group, symmetric, dtype) = case, grid
    rows, cols = data.draw(st.integers(0, 150)), data.draw(st.integers(0, 300))
    seed = data.draw(st.integers(0, 2**31))
    codes, scales, zeros = content(kind, rows, cols, group, symmetric, dtype, nm, seed)
    scales = scales * 2.0 ** data.draw(st.integers(-20, 10))
    packed = P.pack(codes, scales, zeros, kind=kind, group=group, nm=nm)
    again = P.unpack(packed)
    assert torch.equal(again[0], codes) and same_bits(again[1], scales)
    W = P.dequantize(packed, torch.float32)
    assert same_bits(W, floats(codes, scales, zeros, packed, torch.float32))
    pruned = codes == (2 ** (packed.format.bits - 1) if zeros is None else wide(zeros, group, cols))
    assert bool((W[pruned] == 0).all())
    if rows:
        indices = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), max_size=5)))
        indices = indices.to(torch.int64)
        assert same_bits(P.gather(packed, indices, torch.float32), W[indices])


@pytest.mark.parametrize("dtype", P.SCALES, ids=str)
def test_extreme_scales_come_back_bit_for_bit(isa, dtype):
    info = torch.finfo(dtype)
    extreme = [info.max, -info.max, info.tiny, info.smallest_normal, 0.0, -0.0, 1.0]
    smallest = {torch.float32: 2.0**-149, BF16: 2.0**-133, torch.float16: 2.0**-24}[dtype]
    extreme += [smallest, -smallest, 3 * smallest]
    scales = torch.tensor(extreme).to(dtype)[:, None]
    assert int((scales == 0).sum()) == 2, "a subnormal was lost before it reached the kernel"
    codes = torch.randint(0, 16, (len(extreme), 77), dtype=torch.uint8)
    for group in (0, 128):
        packed = P.pack(codes, scales, group=group)
        assert same_bits(P.unpack(packed)[1], scales)
        for out in P.SCALES:
            assert same_bits(P.dequantize(packed, out), floats(codes, scales, None, packed, out))


# ---- floats ----


@pytest.mark.parametrize(("kind", "nm"), CASES)
@pytest.mark.parametrize("dtype", P.SCALES, ids=str)
def test_dequantize_and_gather_round_once_to_fp32_and_once_to_dtype(isa, kind, nm, dtype):
    for i, (group, symmetric, scale) in enumerate(GRIDS):
        rows, cols = SHAPES[i % len(SHAPES)]
        codes, scales, zeros = content(kind, rows, cols, group, symmetric, scale, nm)
        packed = P.pack(codes, scales, zeros, kind=kind, group=group, nm=nm)
        W = P.dequantize(packed, dtype)
        assert same_bits(W, floats(codes, scales, zeros, packed, dtype)), (group, rows, cols)
        indices = torch.arange(rows).flip(0)[None]
        assert same_bits(P.gather(packed, indices, dtype), W[indices])


def test_dequantize_is_near_the_float64_reference(isa):
    codes, scales, zeros = content("int4", 70, 283, 32, False, torch.float32)
    W = P.dequantize(P.pack(codes, scales, zeros, group=32), torch.float32)
    want = P.reference_dequantize(codes, scales, zeros)
    assert bool(((W.double() - want).abs() <= 2.0**-24 * want.abs()).all())  # one rounding
    symmetric = content("int3", 9, 40, 0, True, torch.float32)[:2]
    W = P.dequantize(P.pack(*symmetric, kind="int3", group=0), torch.float32)
    want = P.reference_dequantize(*symmetric, bits=3)
    assert bool(((W.double() - want).abs() <= 2.0**-24 * want.abs()).all())


def test_rows_can_be_dequantized_by_panels(isa):
    codes, scales, zeros = content("int4-mask", 200, 150, 64, False)
    packed = P.pack(codes, scales, zeros, kind="int4-mask", group=64)
    whole, spec = P.dequantize(packed), packed.format.spec()
    for first, count in [(0, 64), (64, 100), (192, 8), (128, 0)]:
        panel = P.pack_dequantize(packed.data, spec, first, count, BF16)
        assert same_bits(panel, whole[first : first + count])
    for first, count in [(1, 5), (64, 137), (256, 0), (-64, 3)]:
        with pytest.raises(ValueError, match=f"rows {first} to {first + count} of 200"):
            P.pack_dequantize(packed.data, spec, first, count, BF16)


def test_gather_takes_any_shape_and_refuses_what_is_no_row(isa):
    codes, scales, _ = content("int8", 50, 40, 0)
    packed = P.pack(codes, scales, kind="int8", group=0)
    W = P.dequantize(packed)
    for indices in (torch.tensor(7), torch.tensor([[3, 49], [0, 3]]), torch.zeros(0, 2).long()):
        rows = P.gather(packed, indices)
        assert rows.shape == (*indices.shape, 40) and same_bits(rows, W[indices])
    strided = torch.arange(50)[::7]
    assert same_bits(P.gather(packed, strided), W[strided])
    for wrong in (50, -1, 2**40):
        with pytest.raises(ValueError, match=f"index {wrong} at place 1 is no row of .* 50 rows"):
            P.gather(packed, torch.tensor([0, wrong]))
    with pytest.raises(ValueError, match="indices must be int64"):
        P.gather(packed, torch.zeros(3, dtype=torch.int32))


# ---- patterns ----


def test_groups_of_none_one_and_two_and_rows_of_zeros(isa):
    for kind, nm in CASES:
        if kind in ("int4", "int3", "int8"):
            continue
        codes = torch.full((67, 140), 8, dtype=torch.uint8)
        codes[5, 4], codes[5, 9], codes[5, 11] = 0, 15, 1  # one, two; the other groups none
        scales = torch.rand(67, 2)
        packed = P.pack(codes, scales, kind=kind, nm=nm)
        assert torch.equal(P.unpack(packed)[0], codes), kind
        W = P.dequantize(packed, torch.float32)
        assert int((W != 0).sum()) == 3 and bool((W[6:] == 0).all())


@pytest.mark.parametrize("kind", ["int4-2:4", "int4-mask", "int4-out"])
def test_all_pruned_and_none_pruned(isa, kind):
    nm = (2, 4) if kind == "int4-out" else None
    zeros = torch.tensor([[0], [15], [7]], dtype=torch.uint8)
    codes, scales = zeros.expand(3, 130).contiguous(), torch.ones(3, 1)
    packed = P.pack(codes, scales, zeros, kind=kind, group=0, nm=nm)
    assert torch.equal(P.unpack(packed)[0], codes)
    assert bool((P.dequantize(packed) == 0).all())
    if kind == "int4-mask":
        kept = (codes + 1) % 16
        packed = P.pack(kept, scales, zeros, kind=kind, group=0)
        assert torch.equal(P.unpack(packed)[0], kept)


@pytest.mark.parametrize("density", [0.02, 0.3, 0.8, 0.97])
def test_a_mask_of_any_density_survives(isa, density):
    """Chunks of 64 with every number of kept codes, odd ones and those beyond 48 included."""
    codes, scales, zeros = content("int4", 130, 260, 64, False)
    rng = torch.Generator().manual_seed(1)
    kept = torch.rand(130, 260, generator=rng) < density
    codes = codes.where(kept, wide(zeros, 64, 260)).contiguous()
    packed = P.pack(codes, scales, zeros, kind="int4-mask", group=64)
    assert torch.equal(P.unpack(packed)[0], codes)
    assert same_bits(P.dequantize(packed), floats(codes, scales, zeros, packed, BF16))


# ---- sizes ----


@pytest.mark.parametrize(("kind", "nm"), CASES)
def test_sizes_are_predicted_to_the_byte(kind, nm):
    for (group, symmetric, dtype), (rows, cols) in itertools.product(GRIDS, SHAPES):
        codes, scales, zeros = content(kind, rows, cols, group, symmetric, dtype, nm)
        packed = P.pack(codes, scales, zeros, kind=kind, group=group, nm=nm)
        form = packed.format
        if kind == "int4-mask":
            values = P.survey(codes, zeros, group)[:, 0].tolist()
            assert form.nbytes is None and packed.nbytes == form.nbytes_for(values)
        else:
            assert packed.nbytes == form.nbytes == form.expected_bytes()


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_size_of_a_random_mask_is_expected_within_a_percent(density):
    rows, cols = 300, 1000
    rng = torch.Generator().manual_seed(0)
    codes = torch.where(torch.rand(rows, cols, generator=rng) < density, 3, 8).to(torch.uint8)
    packed = P.pack(codes, torch.ones(rows, 8, dtype=BF16), kind="int4-mask")
    expected = packed.format.expected_bytes(density)
    assert abs(packed.nbytes - expected) <= 0.01 * packed.nbytes


def test_bytes_per_weight_of_a_large_matrix():
    """What the design promises: 4.125 bits of int4, 3.125 of int3 and of half-sparse int4."""
    bits = {
        kind: 8 * P.Format(kind, 4096, 14336, nm=nm).expected_bytes() / (4096 * 14336)
        for kind, nm in [(k, None) for k in P.KINDS if k != "int4-out"] + [("int4-out", (2, 4))]
    }
    want = {"int4": 4.125, "int3": 3.125, "int8": 8.125, "int4-2:4": 3.125, "int4-out": 3.125}
    assert all(abs(bits[kind] - want[kind]) < 1e-3 for kind in want)
    assert 3.125 < bits["int4-mask"] < 3.19  # an odd chunk wastes a nibble, a tile an offset


# ---- the same everywhere ----


@pytest.mark.parametrize(("kind", "nm"), CASES)
def test_bits_do_not_depend_on_threads_or_instruction_set(kind, nm):
    codes, scales, zeros = content(kind, 260, 2500, 64, False, torch.float32, nm)
    before, seen = torch.get_num_threads(), set()
    for threads, isa in itertools.product((1, 2, 3), machine.ISAS):
        if machine.ISAS.index(isa) > machine.ISAS.index(machine.best_isa()):
            continue
        torch.set_num_threads(threads)
        with machine.use_isa(isa):
            packed = P.pack(codes, scales, zeros, kind=kind, group=64, nm=nm)
            W = P.dequantize(packed)
        seen.add((packed.data.numpy().tobytes(), W.view(torch.int16).numpy().tobytes()))
    torch.set_num_threads(before)
    assert len(seen) == 1


def test_packing_leaves_its_input_alone(isa):
    given = content("int4-mask", 65, 129, 32, False)
    before = [x.clone() for x in given]
    P.pack(*given, kind="int4-mask", group=32)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


# ---- torch ----


@pytest.mark.parametrize(("kind", "nm"), [("int4", None), ("int4-out", (2, 4))])
def test_opcheck(kind, nm):
    codes, scales, zeros = content(kind, 66, 130, 64, False, BF16, nm)
    packed = P.pack(codes, scales, zeros, kind=kind, group=64, nm=nm)
    spec = packed.format.spec()
    check = torch.library.opcheck
    check(P.pack_write, (codes, scales, zeros, None, spec, packed.nbytes))
    check(P.pack_survey, (codes, zeros, spec))
    check(P.pack_read, (packed.data, spec))
    check(P.pack_dequantize, (packed.data, spec, 64, 2, BF16))
    check(P.pack_gather, (packed.data, spec, torch.tensor([[3, 65]]), torch.float16))


def test_compile():
    codes, scales, _ = content("int4-2:4", 66, 130)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(codes, scales, indices):
        packed = P.pack(codes, scales, kind="int4-2:4")
        again = P.unpack(packed)[0]
        return packed.data, again, P.dequantize(packed) * 2, P.gather(packed, indices)

    indices = torch.tensor([[5, 65]])
    data, again, W, rows = run(codes, scales, indices)
    packed = P.pack(codes, scales, kind="int4-2:4")
    assert torch.equal(data, packed.data) and torch.equal(again, codes)
    assert torch.equal(W, P.dequantize(packed) * 2)
    assert torch.equal(rows, P.gather(packed, indices))


def test_a_packed_weight_moves_and_tells_its_size():
    packed = P.pack(*content("int4", 3, 40)[:2])
    moved = packed.to("cpu")
    assert moved.nbytes == packed.nbytes == packed.data.numel()
    assert moved.format == packed.format and torch.equal(moved.data, packed.data)
    assert packed.to("meta").data.is_meta


def test_numpy_scales_of_every_bit_pattern_survive():
    """All finite 16-bit patterns, of both 16-bit floats."""
    patterns = torch.from_numpy(np.arange(65536, dtype=np.uint16).view(np.int16).copy())
    for dtype in (BF16, torch.float16):
        scales = patterns.view(dtype)
        scales = scales[torch.isfinite(scales)][:, None].contiguous()
        codes = torch.full((len(scales), 3), 9, dtype=torch.uint8)
        for group in (0, 32):
            packed = P.pack(codes, scales, group=group)
            assert same_bits(P.unpack(packed)[1], scales)
            assert same_bits(P.dequantize(packed, dtype), scales.expand(-1, 3))
