"""sqgemm: packed products against float64, within the bounds of csrc/sqgemm/sqgemm.h."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from products import (
    BOTH,
    DTYPES,
    KINDS,
    SHAPES,
    check,
    check_linear,
    matrix,
    quantized_sums,
    rand,
    rounded,
    sums,
)

from distaya_ext.ops import machine, sqgemm
from distaya_ext.ops import pack as packing
from distaya_ext.ops.pack import pack


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_double_precision(isa, kind, dtype, exact):
    for i, (rows, cols, tokens) in enumerate(SHAPES):
        packed = matrix(kind, rows, cols, (32, 128, 64, 0)[i % 4], i % 2 == 0, seed=i)
        check_linear(rand(tokens, cols, seed=i).to(dtype), packed, exact)


@BOTH
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_zeros_and_scale_dtypes(isa, kind, group, symmetric, exact):
    for i, scale_dtype in enumerate(DTYPES):
        packed = matrix(kind, 66, 270, group, symmetric, scale_dtype, seed=i)
        for tokens in (2, 9):
            check_linear(rand(tokens, 270, seed=i).bfloat16(), packed, exact)


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_tokens(isa, kind, exact):
    packed, x = matrix(kind, 68, 136), rand(70, 136)
    for tokens in range(71):
        dtype = DTYPES[tokens % 3]
        y = check_linear(x[:tokens].to(dtype), packed, exact)
        assert y.shape == (tokens, 68)


@BOTH
def test_more_tokens_than_a_task_takes(isa, exact):
    for rows, tokens in ((30, 131), (64 * 20, 300)):
        packed = matrix("int4-mask", rows, 130, 64)
        check_linear(rand(tokens, 130).bfloat16(), packed, exact)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_and_leading_dimensions(isa, dtype, exact):
    packed, bias = matrix(rows=70, cols=90), (10 * rand(70, seed=3)).to(dtype)
    x = rand(6, 90).to(dtype)
    flat = check_linear(x, packed, exact, bias)
    assert torch.equal(
        sqgemm.linear(x.view(2, 3, 90), packed, bias, exact=exact).flatten(0, 1), flat
    )
    one = sqgemm.linear(x[0], packed, bias, exact=exact)
    assert one.shape == (70,)
    assert torch.equal(one, sqgemm.linear(x[:1], packed, bias, exact=exact)[0])
    strided = torch.stack([x, x + 1], 2)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(sqgemm.linear(strided, packed, bias, exact=exact), flat)


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_give_exact_zeros(isa, kind, exact):
    """Pruned rows, and tokens of zeros, are exactly 0 whatever the grid."""
    nm = KINDS[kind]
    for symmetric in (True, False):
        packed = matrix(kind, 70, 200, 64, symmetric)
        codes, scales, zeros = packing.unpack(packed)
        point = 2 ** (packed.format.bits - 1) if zeros is None else zeros[20:40]
        if zeros is not None:
            point = point.repeat_interleave(64, 1)[:, :200]
        codes[20:40] = point
        packed = pack(codes, scales, zeros, kind=packed.format.kind, group=64, nm=nm)
        for tokens in (1, 6):
            x = rand(tokens, 200).bfloat16()
            x[-1] = 0
            y = check_linear(x, packed, exact)
            assert not y[:, 20:40].any() and not y[-1].any()


@BOTH
@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("kind", ["int4-2:4", "int4-mask", "int4-out", "int4-out 1:2"])
def test_groups_that_keep_few(isa, kind, kept, exact):
    """Each 4 columns (or m rows) keep exactly 0, 1 or 2 weights, at every place."""
    along_rows = kind.startswith("int4-out")
    n, m = KINDS[kind] or (2, 4)
    lines = (
        torch.arange(80 * 160).view(80, 160) if along_rows else torch.arange(160 * 80).view(160, 80)
    )
    place = torch.arange(160)[None] if not along_rows else torch.arange(80)[:, None]
    other = torch.arange(80)[:, None] if not along_rows else torch.arange(160)[None]
    turn = (place + other + place // m) % m
    mask = turn < min(kept, n)
    codes = torch.full((80, 160), 8, dtype=torch.uint8)
    codes[mask] = (
        lines.reshape(80, 160)[mask] % 15 + (lines.reshape(80, 160)[mask] % 15 > 7)
    ).byte()
    packed = pack(codes, torch.full((80, 5), 0.5), kind=kind.split()[0], group=32, nm=KINDS[kind])
    for tokens in (1, 7):
        check_linear(rand(tokens, 160).bfloat16(), packed, exact)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30])
@pytest.mark.parametrize("kind", ["int4", "int8", "int4-mask"])
def test_extreme_scales(isa, kind, size, dtype, exact):
    packed = matrix(kind, 66, 150, 32, False, dtype, size=size)
    for factor in (1e-3, 1.0, 1e3):
        check_linear((rand(3, 150) * factor).to(dtype), packed, exact)
    mixed = rand(5, 150) * torch.logspace(-20, 2, 150)  # blocks of very different size
    check_linear(mixed.to(dtype), packed, exact)
    check_linear((rand(2, 150) * 1e-36).to(dtype), packed, exact)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_and_format(data):
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    rows, cols = data.draw(st.integers(0, 140)), data.draw(st.integers(0, 300))
    group, symmetric = data.draw(st.sampled_from([32, 64, 128, 0])), data.draw(st.booleans())
    tokens, exact = data.draw(st.integers(0, 20)), data.draw(st.booleans())
    dtype, scale_dtype = (data.draw(st.sampled_from(DTYPES)) for _ in range(2))
    seed, isa = data.draw(st.integers(0, 99)), data.draw(st.sampled_from(machine.ISAS))
    packed = matrix(kind, rows, cols, group, symmetric, scale_dtype, seed)
    bias = rand(rows, seed=seed).to(dtype) if data.draw(st.booleans()) else None
    if machine.ISAS.index(isa) > machine.ISAS.index(machine.best_isa()):
        isa = machine.best_isa()
    with machine.use_isa(isa):
        check_linear(rand(tokens, cols, seed=seed).to(dtype), packed, exact, bias)


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_instruction_sets_agree(kind, exact):
    packed = matrix(kind, 100, 260, 64, False)
    for tokens in (1, 30):
        x = rand(tokens, 260).bfloat16()
        bound = 2 * rounded(sums(x, packed, exact, None), x.dtype)
        results = []
        for isa in machine.ISAS[: machine.ISAS.index(machine.best_isa()) + 1]:
            with machine.use_isa(isa):
                results.append(sqgemm.linear(x, packed, exact=exact).double())
        for other in results[1:]:
            check(other, results[0], bound)
            assert exact or torch.equal(other, results[0])  # sums of int8 products are exact


@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_int8_products_are_those_of_the_rounded_activations(isa, kind, group):
    """Halves to even, per block; and the same bits whichever tokens share the call."""
    packed = matrix(kind, 66, 270, group, False)
    halves = torch.randint(-254, 255, (9, 270), generator=torch.Generator().manual_seed(1)) / 2
    halves[:, ::32] = 127.0  # of each block: its scale is 1
    for x in (halves, rand(9, 270)):
        y, s = sqgemm.linear(x, packed), quantized_sums(x, packed)
        check(y, s.value, rounded(s, x.dtype))
        for tokens in (1, 4, 7):
            assert torch.equal(sqgemm.linear(x[:tokens], packed), y[:tokens])


def test_same_bits_for_any_thread_count(isa):
    for kind in KINDS:
        packed, up = matrix(kind, 150, 260, 32), matrix(kind, 150, 260, 32, seed=5)
        for exact in (True, False):
            for tokens in (1, 4, 100):
                x, results = rand(tokens, 260).bfloat16(), []
                before = torch.get_num_threads()
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    y = sqgemm.linear(x, packed, exact=exact)
                    results.append(torch.cat([y, sqgemm.glu(x, packed, up, exact=exact)]))
                torch.set_num_threads(before)
                assert torch.equal(results[0], results[1])
                assert torch.equal(results[0], results[2])


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_reaches_its_token_and_no_other(isa, dtype, bad, exact):
    for kind in ("int4", "int4-2:4", "int8"):
        packed = matrix(kind, 70, 200, 64)
        for tokens in (3, 9):
            x = rand(tokens, 200).to(dtype)
            clean = sqgemm.linear(x, packed, exact=exact)
            x[1, 77] = bad
            y = sqgemm.linear(x, packed, exact=exact)
            assert not y[1].isfinite().any()
            assert exact or y[1].isnan().all()
            others = torch.arange(tokens) != 1
            assert torch.equal(y[others], clean[others])
            if exact and math.isinf(bad):  # the sign is that of the weight
                w = sqgemm.reference(torch.eye(200)[77:78], packed)[0]
                expected = w.sign() * bad
                assert torch.equal(y[1].double().nan_to_num(5), expected.nan_to_num(5))


def test_columns_beyond_the_matrix_are_not_read(isa):
    """x ends right where a page of NaN begins: as tight a view of it as there can be."""
    packed = matrix("int4", 64, 130)
    memory = torch.full((3 * 130 + 512,), math.nan)
    x = memory[: 3 * 130].view(3, 130)
    x.copy_(rand(3, 130))
    for exact in (True, False):
        check_linear(x, packed, exact)
