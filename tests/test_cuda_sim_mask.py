"""Every CUDA kernel of the mask room, in the simulator: the CPU's results, under every schedule."""

import math

import pytest
import torch
from fake_ranks import RanksByTurns, check_keep

from distaya_ext.ops import mask as M

U = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 300), (70, 1), (7, 37), (19, 257)]
ALONG = ["row", "column", "matrix"]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_ties(*shape: int) -> torch.Tensor:
    """Mostly -2 .. 2, with both zeros and infinities."""
    x = (randn(*shape) * 2).round()
    x.view(-1)[::17] = math.inf
    x.view(-1)[5::31] = -math.inf
    return x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitude_and_wanda_have_the_same_bits(simulator, dtype, shape):
    W, norms = randn(*shape).to(dtype), randn(shape[1], seed=1).abs()
    assert torch.equal(simulator.same_always(lambda: M.magnitude(W)), M.magnitude(W))
    assert torch.equal(simulator.same_always(lambda: M.wanda(W, norms)), M.wanda(W, norms))


@pytest.mark.parametrize("power", [0.0, 0.5, 2.5])
@pytest.mark.parametrize("shape", [*SHAPES, (127, 5)], ids=str)  # 64 bands of 2 rows at most
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ria_is_rounded_once(simulator, dtype, shape, power):
    W, norms = randn(*shape).to(dtype), randn(shape[1], seed=1).abs()
    W[:, -1] = 0  # a dead column
    S, ours = M.reference_score(W, "ria", norms, power), M.ria(W, norms, power)
    S_cuda = simulator.same_always(lambda: M.ria(W, norms, power))
    # fp64 sums and one rounding on either side: mask.h's bound against float64, twice between them
    assert bool(((S_cuda.double() - S).abs() <= 1.0001 * U * S).all())
    assert bool(((S_cuda - ours).abs() <= 2.0002 * U * S).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("along", ALONG)
def test_keep_k_has_the_same_bits(simulator, along, shape):
    size = {"row": shape[1], "column": shape[0], "matrix": shape[0] * shape[1]}[along]
    for scores in (randn(*shape), with_ties(*shape)):
        for k in sorted({0, 1, size // 2, size}):
            expected = M.keep_k(scores, k, along)
            assert torch.equal(
                simulator.same_always(lambda s=scores, k=k: M.keep_k(s, k, along)), expected
            ), k


def test_ties_across_the_chunks_of_a_matrix(simulator):
    scores = with_ties(41, 251)  # 10291 scores: three blocks of 4096
    for k in (2000, 5000, 10290):
        expected = M.keep_k(scores, k, "matrix")
        assert torch.equal(
            simulator.same_always(lambda k=k: M.keep_k(scores, k, "matrix")), expected
        )


@pytest.mark.parametrize("m", [2, 3, 4, 5, 8, 16, 31, 32])
@pytest.mark.parametrize("along", ["inputs", "outputs"])
def test_keep_nm_has_the_same_bits(simulator, along, m):
    shape = (3, 41 * m) if along == "inputs" else (3 * m, 70)
    for scores in (randn(*shape), with_ties(*shape)):
        for n in sorted({1, m // 2, m - 1}):
            expected = M.keep_nm(scores, n, m, along)
            assert torch.equal(
                simulator.same_always(lambda s=scores, n=n: M.keep_nm(s, n, m, along)), expected
            ), n


@pytest.mark.parametrize("call", [*ALONG, "inputs", "outputs"])
def test_the_first_nan_is_named(simulator, call):
    scores = randn(20, 40)
    scores[17, 39] = scores[19, 2] = math.nan
    for schedule in simulator.SCHEDULES:
        with (
            simulator.use(),
            simulator.schedule(schedule),
            pytest.raises(ValueError, match=r"scores \[20, 40\] is NaN at row 17, column 39"),
        ):
            M.keep_k(scores, 3, call) if call in ALONG else M.keep_nm(scores, 2, 4, call)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)], ids=str)
def test_empty_matrices(simulator, shape):
    W, norms = torch.empty(shape), torch.ones(shape[1])
    with simulator.use():
        assert M.magnitude(W).shape == M.ria(W, norms).shape == shape
        for along in ALONG:
            assert M.keep_k(W, 0, along).shape == shape
        assert M.keep_nm(W, 2, 4).shape == M.keep_nm(W, 2, 4, "outputs").shape == shape


@pytest.mark.parametrize("kind", ["random", "ties", "zeros", "NaN"])
def test_a_matrix_on_several_ranks(simulator, kind):
    S = with_ties(70, 61) if kind == "ties" else randn(70, 61) * (kind != "zeros")
    if kind == "NaN":
        S[33, 5] = S[60] = math.nan
    with simulator.use():
        for k in (0, 1, 700, 2001, S.numel() - 1, S.numel()):
            for rows in [(35, 35), (0, 1, 68, 1)]:
                assert check_keep(S, k, rows, RanksByTurns).sizes == [[257] * 4] * len(rows)


def test_ranks_under_every_schedule(simulator):
    S = with_ties(70, 61)

    def keep():
        ranks = RanksByTurns((30, 40))
        parts = ranks.results(lambda r, among: M.mask_keep_k_among(ranks.own(r, S), 2001, among))
        return [t for part in parts for t in part]

    simulator.same_always(keep)
