"""The CUDA kernels of sqgemm, run in the simulator, against float64 (bounds: csrc/sqgemm/sqgemm.h).

The simulator itself refuses races, missing waits, reads of what an earlier launch may still write
and the like (tests/cuda_sim/README.md), so each product here is checked for those as well.
"""

import warnings

import pytest
import torch
from products import (
    DTYPES,
    KINDS,
    Sums,
    check,
    check_gated,
    matrix,
    rand,
    rounded,
    sums,
    sums_of_rounded,
)

from distaya_ext import _C, doctor
from distaya_ext.ops import pack, sqgemm
from distaya_ext.ops.pack import PackedWeight

HALVES = [torch.bfloat16, torch.float16]
WIDE = ["int4", "int4-2:4"]  # what warpgroups multiply


def bound(x: torch.Tensor, packed: PackedWeight, bias=None, wgmma: bool = False) -> Sums:
    return sums_of_rounded(x, packed, bias) if wgmma else sums(x, packed, True, bias)


def product(simulator, x, packed, bias=None, wgmma: bool = False) -> torch.Tensor:
    with simulator.use(), sqgemm.force_wgmma(wgmma):
        assert not wgmma or sqgemm._C.sqgemm_has_wgmma(x, packed.format.spec())
        y = sqgemm.linear(x, packed, bias)
    s = bound(x, packed, bias, wgmma)
    check(y, s.value, rounded(s, x.dtype))
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kernel(simulator, kind, dtype):
    """Every class of tokens (8, 16, 32, 64 at once, more), ragged rows, columns and tokens."""
    shapes = [(70, 200, 3), (130, 129, 11), (65, 127, 20), (33, 140, 41), (20, 90, 70)]
    for i, (rows, cols, tokens) in enumerate(shapes):
        packed = matrix(kind, rows, cols, (32, 0, 64, 128)[i % 4], i % 2 == 0, seed=i)
        bias = rand(rows, seed=i).to(dtype) if i % 2 else None
        product(simulator, rand(tokens, cols, seed=i).to(dtype), packed, bias)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_and_zeros(simulator, kind, group, symmetric):
    scale = DTYPES[group // 32 % 3]
    packed = matrix(kind, 66, 270, group, symmetric, scale, seed=group)
    product(simulator, rand(5, 270).bfloat16(), packed)


@pytest.mark.parametrize("kind", ["int4", "int8", "int4-2:4", "int4-mask"])
def test_columns_split_among_blocks(simulator, kind):
    """Same bits under every schedule: sums of warps and of splits are added in a fixed order."""
    for dtype in DTYPES if kind == "int4" else (torch.bfloat16, torch.float32):
        packed, x = matrix(kind, 100, 2100, 64, False), rand(9, 2100).to(dtype)
        same_always(simulator, x, packed, wgmma=False)


def same_always(simulator, x, packed, wgmma: bool) -> None:
    y = product(simulator, x, packed, wgmma=wgmma)
    with sqgemm.force_wgmma(wgmma):
        assert torch.equal(y, simulator.same_always(lambda: sqgemm.linear(x, packed)))


@pytest.mark.parametrize("tokens", [1, 12, 40, 64, 100])
def test_gated_units(simulator, tokens):
    kind = ("int4-2:4", "int4", "int8")[tokens % 3]
    gated(simulator, kind, 70, 200, tokens, torch.bfloat16, wgmma=False)


def test_gated_units_split_columns(simulator):
    """Partial sums of both matrices: the workspace holds them, and they are not mixed up."""
    packed, x = matrix("int4", 20, 128 * 24, 64), rand(3, 128 * 24).bfloat16()
    with simulator.use():
        one, two = (sqgemm._C.sqgemm_work(x, packed.format.spec(), g, False) for g in (False, True))
    assert two > one > 3 * 128 * 24 * 2  # more than the activations
    for dtype in (torch.bfloat16, torch.float32):
        gated(simulator, "int4", 20, 128 * 24, 3, dtype, wgmma=False)


def gated(simulator, kind, rows, cols, tokens, dtype, wgmma: bool) -> None:
    gate, up = (matrix(kind, rows, cols, 64, False, dtype, seed=s) for s in (1, 2))
    biases = [rand(rows, seed=s).to(dtype) for s in (3, 4)]
    x = rand(tokens, cols).to(dtype)
    act = ("silu", "gelu", "gelu_tanh")[tokens % 3]
    with simulator.use(), sqgemm.force_wgmma(wgmma):
        y = sqgemm.glu(x, gate, up, act=act, bias_gate=biases[0], bias_up=biases[1])
    g, u = (bound(x, w, b, wgmma) for w, b in zip((gate, up), biases, strict=True))
    check_gated(y, g, u, act)


# ---- warpgroup products ----


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", WIDE)
def test_warpgroups(simulator, kind, dtype):
    """One and several row blocks, passes and splits; ragged rows, columns and tokens."""
    shapes = [(300, 270, 64, 64), (70, 517, 70, 32), (20, 700, 131, 0), (129, 128, 200, 128)]
    for i, (rows, cols, tokens, group) in enumerate(shapes):
        packed = matrix(kind, rows, cols, group, i % 2 == 0, dtype, seed=i)
        bias = rand(rows, seed=i).to(dtype) if i % 2 else None
        product(simulator, rand(tokens, cols, seed=i).to(dtype), packed, bias, wgmma=True)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("kind", WIDE)
def test_warpgroups_with_every_grid(simulator, kind, group, symmetric):
    packed = matrix(kind, 70, 300, group, symmetric, seed=group)
    product(simulator, rand(64, 300).bfloat16(), packed, wgmma=True)


@pytest.mark.parametrize(("kind", "tokens"), [("int4", 64), ("int4-2:4", 65)])
def test_warpgroups_split_columns(simulator, kind, tokens):
    """The same bits under every schedule."""
    packed, x = matrix(kind, 70, 128 * 20 - 7, 128), rand(tokens, 128 * 20 - 7).bfloat16()
    same_always(simulator, x, packed, wgmma=True)


@pytest.mark.parametrize("kind", WIDE)
def test_warpgroups_go_round_their_stages(simulator, kind):
    packed, x = matrix(kind, 70, 128 * 9, 64, False), rand(64, 128 * 9).bfloat16()
    product(simulator, x, packed, wgmma=True)


@pytest.mark.parametrize("tokens", [64, 130])
@pytest.mark.parametrize("kind", WIDE)
def test_warpgroups_gate(simulator, kind, tokens):
    gated(simulator, kind, 135, 300, tokens, torch.float16, wgmma=True)
    if tokens == 64:
        gated(simulator, kind, 20, 128 * 31, tokens, torch.bfloat16, wgmma=True)  # splits


def test_warpgroups_keep_what_is_not_finite_to_its_token(simulator):
    packed, x = matrix("int4-2:4", 70, 200, 64), rand(66, 200).bfloat16()
    clean = product(simulator, x, packed, wgmma=True)
    x[3, 77], x[65, 0] = torch.inf, torch.nan
    with simulator.use(), sqgemm.force_wgmma(True):
        y = sqgemm.linear(x, packed)
    others = torch.tensor([token not in (3, 65) for token in range(66)])
    assert torch.equal(y[others], clean[others])
    assert not y[3].isfinite().any() and y[65].isnan().all()


@pytest.mark.parametrize(
    ("kind", "wgmma"), [*((kind, True) for kind in WIDE), ("int4", False), ("int4-mask", False)]
)
def test_weights_of_the_launch_before(simulator, kind, wgmma):
    """Packed on the device a moment ago: nothing of them is read before wait_for_earlier."""
    codes, scales, zeros = pack.unpack(matrix(kind, 66, 130, 0, False))
    x = rand(64 if wgmma else 3, 130).bfloat16()
    with simulator.use(), sqgemm.force_wgmma(wgmma):
        packed = pack.pack(codes, scales, zeros, kind=kind, group=0)
        y = sqgemm.linear(x, packed)
    s = bound(x, packed, None, wgmma)
    check(y, s.value, rounded(s, x.dtype))


@pytest.mark.parametrize("tokens", [5, 64])
def test_activations_at_an_odd_address(simulator, tokens):
    """Whole column tiles, which are read in place where x begins at a multiple of 16 bytes only."""
    packed = matrix("int4", 66, 256)
    x = rand(tokens * 256 + 1).bfloat16()[1:].view(tokens, 256)
    assert x.data_ptr() % 16 == 2
    product(simulator, x, packed, wgmma=tokens >= 64)


def test_results_at_an_odd_address(simulator):
    """Rows are written by twos where y begins at an even place only."""
    packed, x = matrix("int4", 66, 130), rand(64, 130).bfloat16()
    y, spec = x.new_empty(64 * 66 + 1)[1:].view(64, 66), packed.format.spec()
    with simulator.use():
        work = torch.empty(sqgemm._C.sqgemm_work(x, spec, False, True), dtype=torch.uint8)
        assert sqgemm._C.sqgemm_linear(x, packed.data, spec, None, False, True, work, y)
    assert y.data_ptr() % 4 == 2
    assert torch.equal(y, product(simulator, x, packed, wgmma=True))


@pytest.mark.parametrize("wgmma", [False, True], ids=["mma", "wgmma"])
def test_a_workspace_at_an_odd_address_is_refused(simulator, wgmma):
    """Activations are copied from there 16 bytes at a time."""
    packed, x = matrix("int4", 66, 130), rand(64, 130).bfloat16()
    spec, y = packed.format.spec(), x.new_empty(64, 66)
    with simulator.use():
        size = sqgemm._C.sqgemm_work(x, spec, False, wgmma)
        work = torch.empty(size + 1, dtype=torch.uint8)
        with pytest.raises(ValueError, match="work must begin at a multiple of 16 bytes"):
            sqgemm._C.sqgemm_linear(x, packed.data, spec, None, False, wgmma, work[1:], y)
        assert sqgemm._C.sqgemm_linear(x, packed.data, spec, None, False, wgmma, work[:-1], y)


def test_what_warpgroups_do_not_serve(simulator):
    """Few tokens, other kinds, float32, scales of another dtype: the other kernels, exactly."""
    x = rand(64, 130).bfloat16()
    cases = [
        (x[:63], matrix("int4", 65, 130)),
        (x, matrix("int8", 65, 130)),
        (x.float(), matrix("int4", 65, 130)),
        (x, matrix("int4", 65, 130, scale_dtype=torch.float16)),
    ]
    for given, packed in cases:
        with simulator.use(), sqgemm.force_wgmma(True):
            assert not sqgemm._C.sqgemm_has_wgmma(given, packed.format.spec())
            y = sqgemm.linear(given, packed)
        s = sums(given, packed, True, None)
        check(y, s.value, rounded(s, given.dtype))
    assert not _C.sqgemm_has_wgmma(x, matrix("int4", 65, 130).format.spec())


# ---- the check before their first use ----


@pytest.fixture
def unchecked(monkeypatch):
    monkeypatch.setattr(sqgemm, "_checks", {})
    check = sqgemm.wgmma_check
    monkeypatch.setattr(sqgemm, "wgmma_check", lambda device: check(device, 70, 192))


def test_warpgroups_agree_bit_for_bit(simulator, unchecked):
    packed, x = matrix("int4", 65, 130), rand(64, 130).bfloat16()
    with simulator.use(), warnings.catch_warnings():
        warnings.simplefilter("error")
        y = sqgemm.linear(x, packed)
        assert sqgemm._checks[x.device].ok
    assert torch.equal(y, product(simulator, x, packed, wgmma=True))


def test_the_check_does_not_mind_the_default_device(simulator, unchecked):
    with simulator.use(), torch.device("meta"):
        assert sqgemm.wgmma_check(torch.device("cpu")).ok


def test_warpgroups_that_disagree_are_not_used(simulator, unchecked, monkeypatch):
    """A device on which they err: one warning with numbers, and exact products from then on."""
    real = sqgemm._product

    def wrong(x, data, spec, bias, exact, wgmma):
        y = real(x, data, spec, bias, exact, wgmma)
        if wgmma:
            y[-1, -1] += 32
        return y

    monkeypatch.setattr(sqgemm, "_product", wrong)
    packed, x = matrix("int4", 65, 130), rand(64, 130).bfloat16()
    with simulator.use():
        with pytest.warns(RuntimeWarning, match=r"1 of 4480 values differ .* by up to 32 "):
            y = sqgemm.linear(x, packed)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(sqgemm.linear(x, packed), y)
    s = sums(x, packed, True, None)
    check(y, s.value, rounded(s, x.dtype))


def test_doctor_tells_what_the_check_found(monkeypatch):
    for found in (sqgemm.WgmmaCheck(True, "equal"), sqgemm.WgmmaCheck(False, "3 values differ")):
        monkeypatch.setattr(sqgemm, "wgmma_check", lambda device, found=found: found)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        lines = doctor._warpgroups()
        assert len(lines) == 2
        for line in lines.values():
            assert line.endswith(found.report)
            assert line.startswith("wgmma") == found.ok


def test_doctor_tells_of_a_check_that_failed(monkeypatch):
    def check(device):
        raise RuntimeError(f"CUDA error on {device}")

    monkeypatch.setattr(sqgemm, "wgmma_check", check)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert list(doctor._warpgroups().values()) == ["failed: CUDA error on cuda:0"]
