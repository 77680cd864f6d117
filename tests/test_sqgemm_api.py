"""sqgemm: the gated unit, what the ops refuse, how they behave in torch, and their CUDA twins."""

import math

import pytest
import torch
from products import (
    BOTH,
    DTYPES,
    KINDS,
    SHAPES,
    Sums,
    U,
    check,
    check_gated,
    matrix,
    output,
    rand,
    rounded,
    sums,
    sums_of_rounded,
)

from distaya_ext.ops import pack as packing
from distaya_ext.ops import sqgemm
from distaya_ext.ops.pack import PackedWeight, pack

ACTS = ["silu", "gelu", "gelu_tanh"]


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_gated_unit(isa, act, dtype, exact):
    """|act'| <= 1.13 and the activation itself is computed within 10 u |g| (core/activation.h)."""
    for kind, tokens, with_bias in (("int4", 1, True), ("int4-2:4", 5, False), ("int8", 3, True)):
        size = 1.0 if kind != "int8" else 0.05  # gates of all sizes, far into both tails
        gate = matrix(kind, 75, 140, 64, False, seed=1, size=size)
        up = matrix(kind, 75, 140, 64, False, seed=2)
        biases = [rand(75, seed=s).to(dtype) if with_bias else None for s in (3, 4)]
        x = (rand(tokens, 140) * torch.logspace(-3, 0, 140)).to(dtype)
        y = sqgemm.glu(x, gate, up, act=act, bias_gate=biases[0], bias_up=biases[1], exact=exact)
        assert y.dtype == dtype
        g, u = (sums(x, w, exact, b) for w, b in zip((gate, up), biases, strict=True))
        check_gated(y, g, u, act)


@pytest.mark.parametrize("act", ACTS)
def test_activations_over_their_whole_range(isa, act):
    """A gate of one weight, 1, passes x through; up is 0 with a bias of 1."""
    gate, up = (pack(torch.full((1, 1), c).byte(), torch.ones(1, 1), group=0) for c in (9, 8))

    def y(x: torch.Tensor, bias: float = 0.0) -> torch.Tensor:
        biases = {"bias_gate": torch.tensor([bias]), "bias_up": torch.ones(1)}
        return sqgemm.glu(x[:, None], gate, up, act=act, **biases, exact=True)[:, 0]

    special = torch.tensor([0.0, 1e-30, -1e-30, 1e30, -1e30, 3e38, -3e38])
    x = torch.cat([torch.linspace(-120, 120, 30001), special])
    expected = sqgemm.reference_act(x.double(), act)
    error = (y(x) - expected).abs()
    assert (error <= 10 * U * x.double().abs() + 2.0**-149).all()
    near = (x.abs() < 5) & (x != 0)  # here the negative tail keeps its own digits
    assert (error / expected.abs())[near].max() <= 100 * U
    assert y(torch.zeros(1), math.inf) == math.inf
    assert y(torch.zeros(1), math.nan).isnan()
    assert not y(torch.tensor([0.0, -0.0])).any()


X, W = torch.zeros(2, 200).bfloat16(), matrix()
SPEC = W.format.spec()
TINY = matrix("int4-mask", 70, 200)
REFUSED = {
    r"x \(bfloat16 \[2, 199\] on cpu\) must have 200 columns": (
        X[:, 1:].contiguous(),
        W.data,
        SPEC,
        None,
    ),
    "x is float64 but must be one of float32, float16, bfloat16": (X.double(), W.data, SPEC, None),
    "x .* is not contiguous": (torch.zeros(200, 2).bfloat16().t(), W.data, SPEC, None),
    "x must have at least 1 dimension": (torch.zeros(()), W.data, SPEC, None),
    "data .*uint8.*int8": (X, W.data.view(torch.int8), SPEC, None),
    "data .*bytes": (X, W.data[:-1], SPEC, None),
    "data .* is not contiguous": (X, W.data.repeat_interleave(2)[::2], SPEC, None),
    "data .*dimension": (X, W.data[None], SPEC, None),
    "data ": (X, TINY.data[: len(TINY.data) // 2], TINY.format.spec(), None),
    "bias has 69 entries but the weight has 70 rows": (X, W.data, SPEC, X.new_zeros(69)),
    r"bias \(float32 \[70\] on cpu\) must have the dtype of x": (X, W.data, SPEC, torch.zeros(70)),
    "bias must have 1 dimensions": (X, W.data, SPEC, X.new_zeros(1, 70)),
    "bias .* is not contiguous": (X, W.data, SPEC, X.new_zeros(140)[::2]),
    "kind": (X, W.data, [9, *SPEC[1:]], None),
    "group": (X, W.data, [*SPEC[:3], 48, *SPEC[4:]], None),
    "requires grad": (X.float().requires_grad_(), W.data, SPEC, None),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_bad_input_is_refused(sentence):
    for exact in (True, False):
        with pytest.raises(ValueError, match=sentence):
            sqgemm.sqgemm(*REFUSED[sentence], exact)


def test_offsets_that_lead_out_of_the_buffer_are_refused():
    data = TINY.data.clone()
    data.view(torch.int64)[1] = 1 << 40
    with pytest.raises(ValueError, match="data"):
        sqgemm.linear(X, PackedWeight(data, TINY.format))


@pytest.mark.parametrize("group", [32, 0])
def test_masks_that_lead_out_of_the_buffer_are_refused(group):
    packed = matrix("int4-mask", 130, 300, group)
    for tile in (packed.format.tiles - 1, packed.format.tiles - 2):
        data = packed.data.clone()
        body = packed.format.record_bytes - 1024  # after scales and zeros
        at = int(data.view(torch.int64)[tile]) + body
        data[at : at + 1024] = 255
        for exact in (True, False):
            with pytest.raises(ValueError, match=f"tile {tile} is not as long as its mask"):
                sqgemm.linear(torch.zeros(1, 300), PackedWeight(data, packed.format), exact=exact)


def test_bad_gated_units_are_refused():
    with pytest.raises(ValueError, match=r"gate is .*cols=200.* but up is .*cols=100"):
        sqgemm.glu(X, W, matrix(cols=100))
    with pytest.raises(ValueError, match="act is 'relu' but must be silu, gelu or gelu_tanh"):
        sqgemm.glu(X, W, W, act="relu")
    with pytest.raises(ValueError, match=r"up .*bytes"):
        sqgemm.glu(X, W, PackedWeight(W.data[:-64], W.format))
    with pytest.raises(ValueError, match="bias_up has 3 entries but the weight has 70 rows"):
        sqgemm.glu(X, W, W, bias_up=X.new_zeros(3))


def test_empty_products():
    for exact in (True, False):
        empty = matrix(rows=0, cols=40)
        assert sqgemm.linear(torch.zeros(3, 40), empty, exact=exact).shape == (3, 0)
        no_columns, bias = matrix(rows=5, cols=0, group=0), torch.arange(5.0)
        y = sqgemm.linear(torch.zeros(2, 0), no_columns, bias, exact=exact)
        assert torch.equal(y, bias.expand(2, 5))
        assert sqgemm.linear(torch.zeros(0, 4, 200), W, exact=exact).shape == (0, 4, 70)


def test_opcheck_and_compile():
    ops = torch.ops.distaya
    x, bias = rand(2, 3, 200).bfloat16(), rand(70).bfloat16()
    for exact in (True, False):
        for b in (None, bias):
            torch.library.opcheck(ops.sqgemm.default, (x, W.data, SPEC, b, exact))
            args = (x, W.data, W.data, SPEC, "gelu", b, None, exact)
            torch.library.opcheck(ops.sqgemm_glu.default, args)

    def block(x, bias):
        y = sqgemm.linear(x * 2, W, bias)
        return y + sqgemm.glu(x.transpose(0, 1), W, W, exact=True).transpose(0, 1)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, bias), block(x, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_the_kernels_decline(monkeypatch, dtype):
    """What the op does on CUDA with many tokens, run here on the CPU: several panels of 64 rows.

    W is rounded to x's dtype, and torch may round before it adds the bias: 3 roundings more.
    """
    monkeypatch.setattr(sqgemm._C, "sqgemm_linear", lambda *_: False)
    monkeypatch.setattr(sqgemm._C, "sqgemm_glu", lambda *_: False)
    monkeypatch.setattr(sqgemm, "_PANEL_BYTES", 1)
    packed, up = (
        matrix("int4-mask", 150, 90, 32, False),
        matrix("int4-mask", 150, 90, 32, False, seed=4),
    )
    x = rand(5, 2, 90).to(dtype)
    for bias in (None, rand(150).to(dtype)):
        dense = coarser(x, packed, bias)
        check(sqgemm.linear(x, packed, bias), dense.value, dense.error)
        y = sqgemm.glu(x, packed, up, act="gelu", bias_gate=bias)
        check_gated(y, dense, coarser(x, up, None), "gelu")


def coarser(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> Sums:
    """The bound of a dense product with the W of packed, rounded to x's dtype."""
    s = sums(x, packed, True, bias)
    W = packing.reference_dequantize(*packing.unpack(packed), bits=packed.format.bits).abs()
    terms = x.double().abs() @ W.t() + (0 if bias is None else bias.double().abs())
    relative, least = output(x.dtype)
    tiny = least * x.double().abs().sum(-1, keepdim=True)
    return Sums(s.value, s.error + 3 * relative * terms + tiny + packed.format.cols * U * terms)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_matches_double_precision(kind, dtype):
    for i, (rows, cols, tokens) in enumerate([*SHAPES, (300, 517, 70), (128, 256, 700)]):
        packed = matrix(kind, rows, cols, (32, 128, 64, 0)[i % 4], i % 2 == 0, seed=i)
        x, bias = rand(tokens, cols, seed=i).to(dtype), rand(rows, seed=i).to(dtype)
        runs = [sqgemm.linear(x.cuda(), packed.to("cuda"), bias.cuda()) for _ in range(2)]
        assert torch.equal(*runs)
        s = sums(x, packed, True, bias) if tokens < 64 else coarser(x, packed, bias)
        check(runs[0].cpu(), s.value, rounded(s, dtype))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_every_number_of_tokens(kind):
    packed, x = matrix(kind, 68, 136), rand(70, 136).bfloat16()
    on_gpu = packed.to("cuda")
    for tokens in range(71):
        y = sqgemm.linear(x[:tokens].cuda(), on_gpu).cpu()
        exact = tokens < 64
        s = sums(x[:tokens], packed, True, None) if exact else coarser(x[:tokens], packed, None)
        check(y, s.value, rounded(s, x.dtype))


@pytest.mark.cuda
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_gated_unit(dtype, act):
    for tokens in (1, 9, 400):
        gate, up = (matrix("int4-2:4", 140, 300, 64, False, seed=s) for s in (1, 2))
        biases = [rand(140, seed=s).to(dtype) for s in (3, 4)]
        x = rand(tokens, 300).to(dtype)
        on_gpu = [w.to("cuda") for w in (gate, up)]
        given = {"bias_gate": biases[0].cuda(), "bias_up": biases[1].cuda()}
        y = sqgemm.glu(x.cuda(), *on_gpu, act=act, **given).cpu()
        g, u = (coarser(x, w, b) for w, b in zip((gate, up), biases, strict=True))
        check_gated(y, g, u, act)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["int4", "int4-2:4"])
def test_cuda_warpgroups(kind):
    """The check before their first use, then many tokens; only where the device has them."""
    probe = torch.zeros(64, 128, dtype=torch.bfloat16, device="cuda")
    if not sqgemm._C.sqgemm_has_wgmma(probe, matrix(kind, 64, 128).format.spec()):
        pytest.skip("no warpgroup products on this device")
    assert sqgemm.wgmma_check(probe.device).ok
    for i, dtype in enumerate((torch.bfloat16, torch.float16)):
        for rows, cols, tokens in ((300, 4096, 64), (700, 517, 200), (4000, 1100, 300)):
            packed = matrix(kind, rows, cols, (64, 32)[i], i == 0, dtype)
            x = rand(tokens, cols).to(dtype)
            with sqgemm.force_wgmma(True):
                runs = [sqgemm.linear(x.cuda(), packed.to("cuda")) for _ in range(2)]
            assert torch.equal(*runs)
            s = sums_of_rounded(x, packed, None)
            check(runs[0].cpu(), s.value, rounded(s, dtype))
