"""Loops that a grid enters a second time only beyond 65535 rows of blocks: here beyond 2."""

import pytest
import torch
from cuda_sim import build
from cuda_sim.simulator import Simulator
from packed import content, same_bits

from distaya_ext.ops import mask as M
from distaya_ext.ops import pack as P

SOURCES = [
    "csrc/mask/nm_cuda.cu",
    "csrc/mask/score_cuda.cu",
    "csrc/pack/pack_cuda.cu",
    "csrc/pack/read_cuda.cu",
]


@pytest.fixture(scope="module")
def low_grids(simulator) -> Simulator:
    header = (build.ROOT / "csrc/pack/tile.cuh").read_text().replace("#pragma once", "")
    replaced = {}
    for path in SOURCES:
        text = (build.ROOT / path).read_text()
        text = text.replace('#include "pack/tile.cuh"', header)
        assert "65535" in text
        replaced[path] = text.replace("65535", "2")
    return Simulator(build.build(replaced))


def test_scores_and_masks(low_grids):
    W = torch.randn(12, 70, generator=torch.Generator().manual_seed(0))
    norms = torch.rand(70, generator=torch.Generator().manual_seed(1))
    for op in (
        lambda: M.wanda(W, norms),
        lambda: M.keep_nm(W, 1, 3, "outputs"),
        lambda: M.keep_nm(W, 2, 7, "inputs"),
    ):
        expected = op()
        assert torch.equal(low_grids.same_always(op), expected)
    with low_grids.use():
        S = M.ria(W, norms)
    torch.testing.assert_close(S, M.ria(W, norms), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("kind", "nm"), [("int4", None), ("int4-2:4", None), ("int4-mask", None), ("int4-out", (2, 4))]
)
def test_tiles(low_grids, kind, nm):
    """Five rows of tiles, so that shared memory is used again twice."""
    given = content(kind, 300, 140, 64, False, torch.float32, nm)
    packed = P.pack(*given, kind=kind, group=64, nm=nm)
    data = low_grids.same_always(lambda: P.pack(*given, kind=kind, group=64, nm=nm).data)
    assert torch.equal(data, packed.data)
    assert same_bits(low_grids.same_always(lambda: P.dequantize(packed)), P.dequantize(packed))
    codes = low_grids.same_always(lambda: P.unpack(packed)[0])
    assert torch.equal(codes, given[0])
    survey = P.survey(given[0], given[2], 64)
    assert torch.equal(low_grids.same_always(lambda: P.survey(given[0], given[2], 64)), survey)
