"""What pack refuses, the kind it advises, and packing from floats."""

import itertools
import re

import pytest
import torch
from packed import CASES, content, wide

from distaya_ext.errors import InputError
from distaya_ext.ops import pack as P
from distaya_ext.quant import Quant

BF16 = torch.bfloat16


def test_content_that_does_not_fit_is_named_by_its_place(isa):
    def refuses(text: str, codes, scales, zeros=None, **more):
        with pytest.raises(InputError, match=re.escape(text)):
            P.pack(codes, scales, zeros, **more)

    codes, scales = torch.full((130, 300), 8, dtype=torch.uint8), torch.ones(130, 3)
    high = codes.clone()
    high[129, 299], high[70, 150] = 16, 255
    refuses("the code at row 70, column 150 is 255 but int4 holds 0 to 15", high, scales)
    refuses("the code at row 0, column 0 is 8 but int3 holds 0 to 7", codes, scales, kind="int3")
    for kind, nm in CASES[3:]:
        refuses(f"column 150 is 255 but {kind} holds 0 to 15", high, scales, kind=kind, nm=nm)

    crowded = codes.clone()
    crowded[100, 201:204] = 1
    crowded[101, 4:8] = 1
    crowded[100, 220:223] = crowded[127, 130:134] = 1  # later ones of the same tile
    at_most = "int4-2:4 keeps at most 2 of every 4 columns but columns 200 to 203 of row 100 keep"
    refuses(at_most, crowded, scales, kind="int4-2:4")
    crowded = codes.clone()
    crowded[128:130, 299] = 1
    refuses("at most 1 of every 4 rows but rows 128 to 129 of column 299 keep more", crowded,
            scales, kind="int4-out", nm=(1, 4))  # fmt: skip
    crowded[8:13, 17] = 1
    crowded[8:13, 60] = crowded[48:56, 3] = 1
    refuses("rows 8 to 15 of column 17", crowded, scales, kind="int4-out", nm=(4, 8))

    for value, dtype in itertools.product(("inf", "-inf", "nan"), P.SCALES):
        broken = scales.to(dtype)
        broken[99, 1] = float(value)
        for group in (128, 0):
            given = broken if group else broken[:, 1:2].contiguous()
            place = f"the scale of row 99, group {1 if group else 0} is {value}, not finite"
            refuses(place, codes, given, group=group)
    zeros = torch.full((130, 3), 8, dtype=torch.uint8)
    zeros[1, 2] = 16
    refuses("the zero of row 1, group 2 is 16 but int4 holds 0 to 15", codes, scales, zeros)


def test_arguments_that_do_not_fit():
    codes, scales = torch.zeros(4, 200, dtype=torch.uint8), torch.ones(4, 2)
    zeros = torch.zeros(4, 2, dtype=torch.uint8)

    def refuses(text: str, *args, **more):
        with pytest.raises(ValueError, match=text):
            P.pack(*args, **more)

    refuses(r"scales .* must be \[4, 7\]", codes, scales, group=32)
    refuses(r"zeros .* must be \[4, 2\]", codes, scales, zeros[:, :1].contiguous())
    refuses("codes must be uint8", codes.int(), scales)
    refuses("codes must be uint8", codes[0], scales)
    refuses("scales are torch.float64", codes, scales.double())
    refuses("zeros must be uint8", codes, scales, zeros.int())
    refuses("is not contiguous", codes.t().contiguous().t(), scales)
    refuses("kind is 'int5' but must be one of int4, int3", codes, scales, kind="int5")
    refuses("group is 16 but must be", codes, scales, group=16)
    refuses("kind int4-out needs nm", codes, scales, kind="int4-out")
    refuses(r"kind int4 takes no nm, but got \(2, 4\)", codes, scales, nm=(2, 4))
    for nm in [(0, 4), (4, 4), (3, 2), (1, 3), (8, 32)]:
        refuses("nm is ", codes, scales, kind="int4-out", nm=nm)
    with pytest.raises(InputError, match="-1 x 5 cannot be"):
        P.Format("int4", -1, 5)


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [(0, 6, "kind 6"), (1, -1, "-1 x 5"), (2, 2**62, "too large"), (3, 48, "group is 48"),
     (4, 2, "symmetric is 2"), (5, 3, "scale dtype 3"), (6, 1, "n:m is 1:0")],
)  # fmt: skip
def test_raw_specs_are_read_with_care(at, value, text):
    spec, none = P.Format("int4", 3, 5).spec(), torch.zeros(0, dtype=torch.int64)
    data = P.pack(*content("int4", 3, 5)[:2]).data
    assert P.pack_gather(data, spec, none, BF16).shape == (0, 5)
    spec[at] = value
    with pytest.raises(ValueError, match=text):
        P.pack_gather(data, spec, none, BF16)
    with pytest.raises(ValueError, match="8 numbers but this one has 7"):
        P.pack_gather(data, spec[:7], none, BF16)


def test_buffers_that_are_not_packed_matrices_are_refused(isa):
    codes, scales, _ = content("int4-mask", 70, 200, 128)
    packed = P.pack(codes, scales, kind="int4-mask")
    form = packed.format
    offset = packed.data[:32].view(torch.int64)

    def refuses(text: str, data: torch.Tensor, form: P.Format = form):
        for use in (P.unpack, P.dequantize, lambda p: P.gather(p, torch.tensor([0]))):
            with pytest.raises(ValueError, match=text):
                use(P.PackedWeight(data, form))

    refuses("takes at least", packed.data[:100].clone())
    refuses("bytes but its offsets", packed.data[:-16].clone())
    refuses("not aligned to 64", torch.cat([packed.data[:1], packed.data])[1:])
    refuses("must be uint8", packed.data.view(torch.int8))
    refuses("must have 1 dimension", packed.data[None])
    refuses("not contiguous", packed.data.repeat_interleave(2)[::2])
    for place, value in [
        (0, 0),
        (1, -64),
        (1, 2**60),
        (2, int(offset[1])),
        (1, int(offset[1]) + 8),
    ]:
        data = packed.data.clone()
        data[:32].view(torch.int64)[place] = value
        refuses("says that", data)
    data = packed.data.clone()
    mask = int(offset[0]) + 128  # after one group of bf16 scales
    assert int(data[mask : mask + 8].view(torch.int64)) != -1
    data[mask : mask + 1024] = 255
    refuses("the record of tile 0 is not as long as its mask asks for", data)
    refuses("bytes but int4", packed.data, P.Format("int4", 70, 200))


# ---- choosing a kind, packing from floats ----


def test_best_kind_is_the_smallest_that_holds_the_codes(isa):
    for symmetric in (True, False):
        for kind, nm in [("int4-2:4", None), ("int4-out", (2, 4)), ("int4-out", (4, 8)),
                         ("int4-mask", None), ("int4", None)]:  # fmt: skip
            for group in (32, 0):
                codes, _, zeros = content(kind, 200, 300, group, symmetric, nm=nm)
                assert P.best_kind(codes, zeros) == (kind, nm), (symmetric, group)
    assert P.best_kind(torch.zeros(0, 5, dtype=torch.uint8)) == ("int4", None)
    rng = torch.Generator().manual_seed(0)
    for density, kind in [(0.7, "int4-mask"), (0.8, "int4")]:
        kept = torch.rand(512, 512, generator=rng) < density
        assert P.best_kind(torch.where(kept, 3, 8).to(torch.uint8)) == (kind, None)
    with pytest.raises(InputError, match="fit no group"):
        P.best_kind(torch.zeros(4, 300, dtype=torch.uint8), torch.zeros(4, 7, dtype=torch.uint8))


def test_best_kind_promises_what_pack_holds(isa):
    rng = torch.Generator().manual_seed(3)
    for trial in range(30):
        density = trial / 30
        codes = torch.where(torch.rand(70, 133, generator=rng) < density, 3, 8).to(torch.uint8)
        kind, nm = P.best_kind(codes)
        packed = P.pack(codes, torch.ones(70, 1), kind=kind, nm=nm, group=0)
        dense = P.pack(codes, torch.ones(70, 1), group=0)
        assert packed.nbytes <= dense.nbytes + 64


@pytest.mark.parametrize("dtype", P.SCALES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_from_dense_keeps_zeros_of_both_signs(isa, dtype, symmetric):
    W = torch.randn(70, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    pruned = torch.arange(300) % 4 < 2
    W[:, pruned] = 0.0
    W[::2, pruned] = -0.0
    W[3] = -0.0
    for bits, kind in [(4, "int4"), (3, "int3"), (8, "int8"), (4, "int4-2:4"), (4, "int4-mask")]:
        quant = Quant(bits, 64, symmetric, scale_dtype=dtype)
        packed = P.from_dense(W, quant, kind=kind)
        codes, scales, zeros = P.unpack(packed)
        assert scales.dtype == dtype and (zeros is None) == symmetric
        Q = P.dequantize(packed, torch.float32)
        assert bool((Q[:, pruned] == 0).all()) and bool((Q[3] == 0).all())
        # Nearest code, except at the ends of the range, which the rounded scale and zero may cut
        # by half a step each, and the symmetric range's upper end by one.
        step = wide(scales, 64, 300).float().abs()
        assert bool(((Q - W.float()).abs() <= 1.6 * step).all())
        assert torch.equal(codes == (zeros_of(packed, zeros)), Q == 0)


def zeros_of(packed, zeros):
    form = packed.format
    return 2 ** (form.bits - 1) if zeros is None else wide(zeros, form.group, form.cols)


def test_from_dense_refuses_what_does_not_fit():
    W = torch.randn(8, 64)
    with pytest.raises(InputError, match="codes of 4 bits but quant asks for 3"):
        P.from_dense(W, Quant(3), kind="int4")
    with pytest.raises(InputError, match="at most 2 of every 4 columns"):
        P.from_dense(W, Quant(4), kind="int4-2:4")
    with pytest.raises(InputError, match=r"W must be \[rows, cols\]"):
        P.from_dense(W[0], Quant(4))
    packed = P.from_dense(torch.zeros(8, 64), Quant(4, 32), kind="int4-out", nm=(2, 4))
    assert packed.format.nm == (2, 4)
