"""More than 2^31 elements: indices are 64 bits wide everywhere.

Inputs are numpy's zeros, which the system maps to one page until somebody writes: gigabytes of
operand, of which only the elements that matter exist. Outputs are small. What an int would lose is
at both sides of element 2^31 and at the very end.
"""

import math
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch

from distaya_ext.ops import hessian, influence, machine, obs, pack, sqgemm
from distaya_ext.packed import PackedWeight
from distaya_ext.quant import Quant

EDGE = 2**31
NEEDED = 3 << 30

pytestmark = pytest.mark.skipif(
    psutil.virtual_memory().available < NEEDED, reason="needs 3 GiB of free memory"
)


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor whose pages are not there yet, at an address that is a multiple of 64."""
    size = math.prod(shape) * dtype.itemsize
    memory = torch.from_numpy(np.zeros(size + 64, np.uint8))
    first = -memory.data_ptr() % 64
    return memory[first : first + size].view(dtype).view(shape)


def test_memory_is_not_taken():
    before = psutil.Process().memory_info().rss
    t = zeros(EDGE + 7)
    t[-1] = 1
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_read():
    t = zeros(EDGE + 128, dtype=torch.uint8)
    t[EDGE - 1], t[EDGE], t[-1] = 1, 2, 4
    assert machine.read(t) == 1 << 56 | 2 | 4 << 56


def test_sums_over_tokens():
    """2^31 / 2048 + 1 tokens end behind the edge; test_hessian.py has the products."""
    X = zeros(EDGE // 2048 + 1, 2048)
    X[-2, 5], X[-1, 7] = 3.0, 2.0
    s = torch.zeros(2048)
    hessian.column_sq_(s, X)
    assert s.nonzero().flatten().tolist() == [5, 7] and s[5] == 9 and s[7] == 4


def test_similarity():
    X, Y = (zeros(2, EDGE // 2 + 8) for _ in range(2))
    X[1, -1], Y[1, -1], Y[1, 0] = 3.0, 3.0, 4.0
    cos, _, moved = (float(v) for v in influence.similarity(X, Y)[1])
    assert cos == pytest.approx(1 - 0.6) and moved == pytest.approx(4 / 3)


def test_grids():
    W = zeros(EDGE // 4096 + 1, 4096)
    W[-2, 4095], W[-1, 4095] = 8.0, -15.0
    found = obs.grids(W, Quant(4, 0))
    expected = obs.grids(W[-3:].clone(), Quant(4, 0))
    for t, last in zip(found, expected, strict=True):
        assert torch.equal(t[-3:], last) and bool((t[:-2] == last[0]).all())
    assert len(expected[0].unique()) == 3


def test_survey():
    codes = zeros(EDGE // 4096 + 1, 4096, dtype=torch.uint8)
    small = pack.survey(codes[:64].contiguous())
    found = pack.survey(codes)
    assert found.shape[0] > small.shape[0] and found.shape[1:] == small.shape[1:]


@pytest.fixture(scope="module")
def packed() -> tuple[PackedWeight, PackedWeight]:
    """64 rows, and more than 2^31 bytes of zeros (scales, too) that end in these rows."""
    cols = 1 << 14
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (64, cols), generator=rng, dtype=torch.uint8)
    scales = torch.full((64, cols // 128), 2.0**-9, dtype=torch.bfloat16)
    small = pack.pack(codes, scales)
    body = small.nbytes - 64  # what follows the records means nothing
    times = EDGE // body + 2
    data = zeros(body * times + 64, dtype=torch.uint8)
    data[-small.nbytes :] = small.data
    return small, PackedWeight(data, replace(small.format, rows=64 * times))


def test_packed_rows(packed):
    small, large = packed
    rows = torch.arange(large.format.rows - 65, large.format.rows)
    found = pack.gather(large, rows)
    assert not found[0].any() and torch.equal(found[1:], pack.dequantize(small))
    data, spec = large.data, large.format.spec()
    last = torch.ops.distaya.pack_dequantize(data, spec, int(rows[1]), 64, torch.bfloat16)
    assert torch.equal(last, found[1:])


def test_packed_product(packed):
    small, large = packed
    x = torch.randn(1, small.format.cols, generator=torch.Generator().manual_seed(1))
    y = sqgemm.linear(x.bfloat16(), large)
    assert torch.equal(y[:, -64:], sqgemm.linear(x.bfloat16(), small)) and y[:, -64:].any()
    assert not y[:, :-64].any()
