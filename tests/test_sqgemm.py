"""sqgemm: packed products against float64, within the bounds of csrc/sqgemm/sqgemm.h."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distaya_ext.ops import machine, sqgemm
from distaya_ext.ops import pack as packing
from distaya_ext.ops.pack import Format, PackedWeight, pack

U = 2.0**-24
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
OUTPUT = {torch.bfloat16: (2.0**-8, 2.0**-134), torch.float16: (2.0**-11, 2.0**-25)}
ACTS = ["silu", "gelu", "gelu_tanh"]
# Every kind, int4_out with two patterns.
KINDS = {
    "int4": None,
    "int3": None,
    "int8": None,
    "int4-2:4": None,
    "int4-mask": None,
    "int4-out": (4, 8),
    "int4-out 1:2": (1, 2),
}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def keep(kind: str, nm: tuple[int, int] | None, rows: int, cols: int, seed: int) -> torch.Tensor:
    """Where a kind may hold weights: bool [rows, cols], groups with fewer than allowed included."""
    score = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed))
    some = score > 0.3
    if kind == "int4-mask":
        return some
    if kind not in ("int4-2:4", "int4-out") or not some.numel():
        return torch.ones(rows, cols, dtype=torch.bool)
    n, m = nm or (2, 4)
    lines = score if kind == "int4-2:4" else score.t()
    width = lines.shape[1]
    padded = torch.nn.functional.pad(lines, (0, -width % m), value=-1.0).unflatten(1, (-1, m))
    best = torch.zeros_like(padded, dtype=torch.bool).scatter_(2, padded.topk(n, 2).indices, True)
    best = best.flatten(1)[:, :width]
    return (best if kind == "int4-2:4" else best.t()) & some


def matrix(
    kind: str = "int4",
    rows: int = 70,
    cols: int = 200,
    group: int = 128,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    size: float = 0.02,
) -> PackedWeight:
    """A packed matrix of random codes and scales around ``size``."""
    name, nm = kind.split()[0], KINDS[kind]
    bits = {"int3": 3, "int8": 8}.get(name, 4)
    random = torch.Generator().manual_seed(seed + 1)
    groups = -(-cols // group) if group else 1
    zeros = torch.full((rows, groups), 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zeros.random_(0, 2**bits, generator=random)
    codes = torch.empty(rows, cols, dtype=torch.uint8).random_(0, 2**bits, generator=random)
    wide = zeros.repeat_interleave(group or max(cols, 1), 1)[:, :cols]
    codes = codes.where(keep(name, nm, rows, cols, seed), wide).contiguous()
    scales = (size * (0.1 + torch.rand(rows, groups, generator=random))).to(scale_dtype)
    return pack(codes, scales, None if symmetric else zeros, kind=name, group=group, nm=nm)


@dataclass
class Sums:
    """A reference product and how far the fp32 sums may be from it, both fp64 [tokens, rows]."""

    value: torch.Tensor
    error: torch.Tensor


def sums(x: torch.Tensor, packed: PackedWeight, exact: bool, bias: torch.Tensor | None) -> Sums:
    """The reference and the bound before the rounding to y's dtype.

    Exact. One sum of g terms takes g products, each added with a rounding of at most u of what
    has been summed, so at most g u S_group with S = sum |x||w|; at most 4 parts of it are added;
    K / g scaled sums follow, each one rounding; with group 0 the scale and with a bias its
    addition one more: (g + K / g + 4) u S to first order, taken 1 % larger for the higher ones.
    What is below 2^-126 may be flushed where pairs of bf16 are multiplied: 2^-126 times
    scale (1 + |code - zero|) = scale + |w| per element; elsewhere a rounding of a subnormal loses
    2^-150 per scaled sum.
    W4A8. x = s q + d with |d| <= s / 2, up to the rounding of x / s <= 127 (127 u) and of s
    (u |x| <= 127 u s): sum |w| s (1 / 2 + 2^-16). Sums of q (code - zero) are exact, below 2^24 in
    fp32; two roundings scale them, K / g add them up: (K / g + 4) u sum |w| (|x| + s). Where s
    itself is subnormal, 2^-142 per element (csrc/sqgemm/activations.h).
    """
    f = packed.format
    codes, scales, zeros = packing.unpack(packed)
    W = packing.reference_dequantize(codes, scales, zeros, bits=f.bits).abs()
    a, run = x.double().abs(), f.group or 128
    value = sqgemm.reference(x, packed, bias)
    more = 0 if bias is None else bias.double().abs()
    runs = -(-f.cols // run)
    if exact:
        error = 1.01 * (run + runs + 4) * U * (a @ W.t() + more)
        scale = scales.double().repeat_interleave(f.group or max(f.cols, 1), 1)[:, : f.cols].abs()
        return Sums(value, error + 2.0**-126 * (scale + W).sum(1) + runs * 2.0**-150)
    padded = torch.nn.functional.pad(a, (0, -f.cols % run)).unflatten(1, (-1, run))
    step = (padded.amax(2) / 127).repeat_interleave(run, 1)[:, : f.cols]
    error = (0.5 + 2.0**-16) * step @ W.t() + 2.0**-142 * W.sum(1) + runs * 2.0**-149
    return Sums(value, error + 1.01 * (runs + 4) * U * ((a + step) @ W.t() + more))


def rounded(s: Sums, dtype: torch.dtype) -> torch.Tensor:
    """The bound of y: that of the sums, and half a last place of y (or of a subnormal)."""
    relative, least = OUTPUT.get(dtype, (U, 2.0**-150))
    return s.error + relative * (s.value.abs() + s.error) + least


def check(y: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    assert y.shape == expected.shape
    excess = (y.double() - expected).abs() - bound
    assert not excess.isnan().any()
    assert y.numel() == 0 or excess.max() <= 0, f"{excess.max():.3g} over the bound"


def check_linear(
    x: torch.Tensor, packed: PackedWeight, exact: bool, bias: torch.Tensor | None = None
) -> torch.Tensor:
    y = sqgemm.linear(x, packed, bias, exact=exact)
    assert y.dtype == x.dtype
    s = sums(x, packed, exact, bias)
    check(y, s.value, rounded(s, x.dtype))
    return y


# rows, columns, tokens: single ones, whole tiles, ragged ones, several tiles each way
SHAPES = [(1, 1, 1), (64, 128, 4), (65, 127, 7), (3, 300, 2), (200, 131, 13), (130, 400, 1)]


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "w4a8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_double_precision(isa, kind, dtype, exact):
    for i, (rows, cols, tokens) in enumerate(SHAPES):
        packed = matrix(kind, rows, cols, (32, 128, 64, 0)[i % 4], i % 2 == 0, seed=i)
        check_linear(rand(tokens, cols, seed=i).to(dtype), packed, exact)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "w4a8"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_zeros_and_scale_dtypes(isa, kind, group, symmetric, exact):
    for i, scale_dtype in enumerate(DTYPES):
        packed = matrix(kind, 66, 270, group, symmetric, scale_dtype, seed=i)
        for tokens in (2, 9):
            check_linear(rand(tokens, 270, seed=i).bfloat16(), packed, exact)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "w4a8"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_tokens(isa, kind, exact):
    packed, x = matrix(kind, 68, 136), rand(70, 136)
    for tokens in range(71):
        dtype = DTYPES[tokens % 3]
        y = check_linear(x[:tokens].to(dtype), packed, exact)
        assert y.shape == (tokens, 68)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "w4a8"])
def test_more_tokens_than_a_task_takes(isa, exact):
    for rows, tokens in ((30, 131), (64 * 20, 300)):
        packed = matrix("int4-mask", rows, 130, 64)
        check_linear(rand(tokens, 130).bfloat16(), packed, exact)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "w4a8"])
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


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "w4a8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_gated_unit(isa, act, dtype, exact):
    """|act'| <= 1.13 and the activation itself is computed within 10 u |g| (epilogue.h)."""
    for kind, tokens, with_bias in (("int4", 1, True), ("int4-2:4", 5, False), ("int8", 3, True)):
        size = 1.0 if kind != "int8" else 0.05  # gates of all sizes, far into both tails
        gate = matrix(kind, 75, 140, 64, False, seed=1, size=size)
        up = matrix(kind, 75, 140, 64, False, seed=2)
        biases = [rand(75, seed=s).to(dtype) if with_bias else None for s in (3, 4)]
        x = (rand(tokens, 140) * torch.logspace(-3, 0, 140)).to(dtype)
        y = sqgemm.glu(x, gate, up, act=act, bias_gate=biases[0], bias_up=biases[1], exact=exact)
        assert y.dtype == dtype
        g, u = (sums(x, w, exact, b) for w, b in zip((gate, up), biases, strict=True))
        a, most = sqgemm.reference_act(g.value, act), u.value.abs() + u.error
        error = (1.13 * g.error + 10 * U * (g.value.abs() + g.error)) * most + a.abs() * u.error
        product = Sums(a * u.value, error + U * (a * u.value).abs() + 2.0**-149)
        check(y, product.value, rounded(product, dtype))


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


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "w4a8"])
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


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "w4a8"])
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


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "w4a8"])
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


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "w4a8"])
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


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "w4a8"])
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


def test_formats_compare_by_content():
    assert W.format == Format("int4", 70, 200)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_matches_double_precision(kind, dtype):
    for i, (rows, cols, tokens) in enumerate([*SHAPES, (300, 517, 70), (128, 256, 700)]):
        packed = matrix(kind, rows, cols, (32, 128, 64, 0)[i % 4], i % 2 == 0, seed=i)
        x, bias = rand(tokens, cols, seed=i).to(dtype), rand(rows, seed=i).to(dtype)
        runs = [sqgemm.linear(x.cuda(), packed.to("cuda"), bias.cuda()) for _ in range(2)]
        assert torch.equal(*runs)
        s = sums(x, packed, True, bias)
        check(runs[0].cpu(), s.value, rounded(s, dtype))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_every_number_of_tokens(kind):
    packed, x = matrix(kind, 68, 136), rand(70, 136).bfloat16()
    on_gpu = packed.to("cuda")
    for tokens in range(71):
        y = sqgemm.linear(x[:tokens].cuda(), on_gpu).cpu()
        s = sums(x[:tokens], packed, True, None)
        check(y, s.value, rounded(s, x.dtype))
