"""The GPU packs, reads and refuses as the CPU does, bit for bit."""

import itertools

import pytest
import torch
from packed import CASES, GRIDS, SHAPES, content, same_bits

from distaya_ext.errors import InputError
from distaya_ext.ops import pack as P

BF16 = torch.bfloat16


def on_cuda(*tensors):
    return [None if t is None else t.cuda() for t in tensors]


@pytest.mark.cuda
@pytest.mark.parametrize(("kind", "nm"), CASES)
def test_cuda_has_the_same_bits(kind, nm):
    for (group, symmetric, dtype), (rows, cols) in itertools.product(GRIDS, SHAPES):
        given = content(kind, rows, cols, group, symmetric, dtype, nm)
        packed = P.pack(*given, kind=kind, group=group, nm=nm)
        moved = P.pack(*on_cuda(*given), kind=kind, group=group, nm=nm)
        assert torch.equal(moved.data.cpu(), packed.data), (group, symmetric, rows, cols)
        again = P.unpack(moved)
        assert torch.equal(again[0].cpu(), given[0]) and same_bits(again[1].cpu(), given[1])
        assert again[2] is None if symmetric else torch.equal(again[2].cpu(), given[2])
        for out in P.SCALES:
            W = P.dequantize(packed, out)
            assert same_bits(P.dequantize(moved, out).cpu(), W)
            indices = torch.arange(rows)[::3]
            assert same_bits(P.gather(moved, indices.cuda(), out).cpu(), W[indices])


@pytest.mark.cuda
def test_cuda_gives_nan_for_what_is_no_row():
    packed = P.pack(*content("int8", 70, 200, 0)[:2], kind="int8", group=0)
    rows = P.gather(packed.to("cuda"), torch.tensor([69, 70, -1]).cuda())
    assert bool(rows[1:].isnan().all()) and torch.equal(rows[0].cpu(), P.dequantize(packed)[69])


@pytest.mark.cuda
def test_cuda_refuses_what_the_cpu_refuses():
    cases = [("int4", None), ("int4-2:4", None), ("int4-out", (2, 4)), ("int4-mask", None)]
    for kind, nm in cases:
        codes, scales, zeros = content(kind, 130, 300, 32, False, torch.float32, nm)
        for part, value in [(codes, 99), (scales, float("nan")), (zeros, 77)]:
            kept = part[70, 5].clone()
            part[70, 5] = value
            sentences = []
            for device in ("cpu", "cuda"):
                with pytest.raises(InputError) as caught:
                    P.pack(*(t.to(device) for t in (codes, scales, zeros)), kind=kind, group=32,
                           nm=nm)  # fmt: skip
                sentences.append(str(caught.value))
            assert sentences[0] == sentences[1]
            part[70, 5] = kept
        assert P.best_kind(codes.cuda(), zeros.cuda()) == P.best_kind(codes, zeros)
