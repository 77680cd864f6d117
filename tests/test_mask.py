"""Scores against float64 within one rounding; masks bit for bit against a stable sort."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from distaya_ext.ops import mask as M

U = 2.0**-24  # half a unit in the last place of fp32
TINY = 2.0**-149  # spacing of the smallest fp32 numbers
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 130), (130, 1), (7, 37), (64, 96), (33, 257), (129, 40)]
METHODS = ["magnitude", "wanda", "ria"]

# Hypothesis keeps one fixture value for all examples of a test, which is what `isa` wants.
examples = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def score(method: str, W: torch.Tensor, norms: torch.Tensor, power: float = 0.5) -> torch.Tensor:
    if method == "magnitude":
        return M.magnitude(W)
    return M.wanda(W, norms) if method == "wanda" else M.ria(W, norms, power)


def assert_one_rounding(S: torch.Tensor, ref: torch.Tensor) -> None:
    """|S - ref| <= u |ref| + tiny: the product is rounded once.

    RIA's fp64 sums of n terms add n 2^-53 relative, under 2^-30 for any n here: hence the 1.0001.
    """
    assert S.dtype == torch.float32 and S.shape == ref.shape
    assert bool(((S.double() - ref).abs() <= 1.0001 * U * ref.abs() + TINY).all())


# ---- scores ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_match_float64(isa, method, dtype):
    for shape in SHAPES:
        W = randn(*shape).to(dtype)
        norms = randn(shape[1], seed=1).abs()
        assert_one_rounding(score(method, W, norms), M.reference_score(W, method, norms))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.5])
def test_ria_takes_any_power(isa, power):
    W, norms = randn(20, 50), randn(50, seed=1).abs()
    assert_one_rounding(M.ria(W, norms, power), M.reference_score(W, "ria", norms, power))


def test_ria_sums_stay_accurate_over_many_terms(isa):
    W = torch.full((3, 70001), 0.1)
    W[:, 0] = 1e6  # an fp32 running sum would swallow part of every 0.1 that follows
    norms = torch.ones(70001)
    assert_one_rounding(M.ria(W, norms), M.reference_score(W, "ria", norms))


def test_ria_of_dead_rows_and_columns_is_zero(isa):
    W = randn(12, 40)
    W[3] = 0
    W[:, 17] = -0.0
    S = M.ria(W, torch.ones(40))
    assert bool((S[3] == 0).all()) and bool((S[:, 17] == 0).all())
    assert_one_rounding(S, M.reference_score(W, "ria", torch.ones(40)))
    assert bool((M.ria(torch.zeros(5, 8), torch.ones(8)) == 0).all())


def test_ria_survives_subnormal_weights(isa):
    W = torch.full((4, 16), 2.0**-149)
    assert bool(torch.isfinite(M.ria(W, torch.ones(16))).all())
    assert_one_rounding(M.ria(W, torch.ones(16)), torch.full((4, 16), 1 / 16 + 1 / 4).double())


@pytest.mark.parametrize("method", METHODS)
def test_scores_ignore_signs_and_leave_weights_alone(isa, method):
    W, norms = randn(9, 70), randn(70, seed=1).abs()
    before = W.clone()
    assert torch.equal(score(method, W, norms), score(method, -W, norms))
    assert torch.equal(W, before)


def test_ria_does_not_see_the_scale_of_weights(isa):
    W, norms = randn(30, 41), randn(41, seed=1).abs()
    assert torch.equal(M.ria(W, norms), M.ria(W * 1024, norms))  # powers of two round nothing
    assert not torch.equal(M.wanda(W, norms), M.wanda(W * 1024, norms))


@pytest.mark.parametrize("method", METHODS)
def test_permuted_weights_have_permuted_scores(isa, method):
    W, norms = randn(23, 65), randn(65, seed=1).abs()
    rows = torch.randperm(23, generator=torch.Generator().manual_seed(2))
    cols = torch.randperm(65, generator=torch.Generator().manual_seed(3))
    permuted = score(method, W[rows][:, cols].contiguous(), norms[cols].contiguous())
    torch.testing.assert_close(permuted, score(method, W, norms)[rows][:, cols], rtol=3 * U, atol=0)


# ---- selection ----


def size_of(scores: torch.Tensor, along: str) -> int:
    rows, cols = scores.shape
    return {"row": cols, "column": rows, "matrix": rows * cols}[along]


def assert_keeps_k(scores: torch.Tensor, k: int, along: str) -> None:
    mask = M.keep_k(scores, k, along)
    assert mask.dtype == torch.bool and mask.shape == scores.shape
    counts = {"row": mask.sum(1), "column": mask.sum(0), "matrix": mask.sum().reshape(1)}[along]
    assert bool((counts == k).all()), counts
    assert torch.equal(mask, M.reference(scores, k, along=along))


@pytest.mark.parametrize("along", ["row", "column", "matrix"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_keep_k_matches_a_stable_sort(isa, along, shape):
    smooth = randn(*shape)
    tied = (smooth * 2).round()  # mostly -2 .. 2, with both zeros
    for scores in (smooth, tied, smooth.abs().bfloat16().float()):
        n = size_of(scores, along)
        for k in {0, 1, n // 3, n // 2, n - 1, n}:
            assert_keeps_k(scores, k, along)


@pytest.mark.parametrize("along", ["row", "column", "matrix"])
def test_keep_k_of_many_chunks_of_the_matrix(isa, along):
    scores = randn(301, 1031).bfloat16().float()  # several tasks, with ties across all of them
    assert_keeps_k(scores, size_of(scores, along) // 2, along)


finite_or_infinite = st.floats(width=32, allow_nan=False) | st.sampled_from(
    [0.0, -0.0, 1.0, math.inf, -math.inf, 2.0**-149, -(2.0**-149)]
)
matrices = st.tuples(st.integers(1, 9), st.integers(1, 70)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=finite_or_infinite)
)


@examples
@given(scores=matrices, data=st.data(), along=st.sampled_from(["row", "column", "matrix"]))
def test_keep_k_of_any_floats(isa, scores, data, along):
    scores = torch.from_numpy(scores)
    assert_keeps_k(scores, data.draw(st.integers(0, size_of(scores, along))), along)


@examples
@given(data=st.data(), m=st.integers(2, 32), along=st.sampled_from(["inputs", "outputs"]))
def test_keep_nm_of_any_floats(isa, data, m, along):
    n = data.draw(st.integers(1, m - 1))
    groups, others = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    shape = (others, groups * m) if along == "inputs" else (groups * m, others)
    scores = torch.from_numpy(data.draw(arrays(np.float32, shape, elements=finite_or_infinite)))
    assert torch.equal(M.keep_nm(scores, n, m, along), M.reference(scores, n, m, along))


@pytest.mark.parametrize("along", ["inputs", "outputs"])
@pytest.mark.parametrize("m", range(2, 33))
def test_keep_nm_matches_a_stable_sort(isa, along, m):
    for n in {1, m // 2, m - 1}:
        for rows, cols in ((m, 37 * m), (3 * m, m), (5 * m, 2 * m)):
            smooth = randn(rows, cols)
            for scores in (smooth, (smooth * 2).round()):
                mask = M.keep_nm(scores, n, m, along)
                assert torch.equal(mask, M.reference(scores, n, m, along))
                groups = mask.reshape(-1, m, 1 if along == "inputs" else cols).sum(1)
                assert bool((groups == n).all())


def test_equal_scores_keep_the_lowest_index(isa):
    scores = torch.tensor([[0.0, -0.0, 0.0, -0.0], [-0.0, 0.0, -0.0, 0.0]])
    first = torch.tensor([[True, True, False, False]] * 2)
    assert torch.equal(M.keep_k(scores, 2), first)
    assert torch.equal(M.keep_nm(scores, 2, 4), first)
    assert M.keep_k(scores, 1, "column").tolist() == [[True] * 4, [False] * 4]
    assert M.keep_nm(scores, 1, 2, "outputs").tolist() == [[True] * 4, [False] * 4]
    assert M.keep_k(scores, 5, "matrix").flatten().tolist() == [True] * 5 + [False] * 3


@pytest.mark.parametrize("along", ["row", "column", "matrix"])
def test_masks_follow_permutations_and_ignore_scale(isa, along):
    scores = torch.randperm(40 * 60, generator=torch.Generator().manual_seed(0)).float()
    scores = scores.reshape(40, 60) - 700  # distinct, some negative
    rows, cols = torch.randperm(40), torch.randperm(60)
    k = size_of(scores, along) // 2
    mask = M.keep_k(scores, k, along)
    assert torch.equal(M.keep_k(scores[rows][:, cols].contiguous(), k, along), mask[rows][:, cols])
    assert torch.equal(M.keep_k(scores * 2.0**-20, k, along), mask)


def test_directions_are_transposes_of_each_other(isa):
    scores = randn(48, 64)
    flipped = scores.t().contiguous()
    assert torch.equal(M.keep_k(scores, 11, "column"), M.keep_k(flipped, 11, "row").t())
    assert torch.equal(M.keep_nm(scores, 2, 4, "outputs"), M.keep_nm(flipped, 2, 4, "inputs").t())


# ---- the same bits always ----


def everything(W: torch.Tensor, norms: torch.Tensor) -> list[torch.Tensor]:
    S = M.ria(W, norms)
    masks = [M.keep_k(S, size_of(S, a) // 2, a) for a in ("row", "column", "matrix")]
    masks += [M.keep_nm(S, 2, 4), M.keep_nm(S, 4, 8, "outputs"), M.keep_nm(S, 3, 5, "inputs")]
    return [S, M.magnitude(W), M.wanda(W, norms), *masks]


@pytest.fixture(scope="module")
def one_thread():
    """Every op's result with one thread, on the best instruction set."""
    W, norms = randn(400, 1000).bfloat16(), randn(1000, seed=1).abs()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield W, norms, everything(W, norms)
    torch.set_num_threads(before)


def test_threads_do_not_change_bits(one_thread, threads):
    W, norms, expected = one_thread
    for ours, theirs in zip(everything(W, norms), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_instruction_sets_do_not_change_masks(one_thread, isa):
    expected = one_thread[2]
    S = expected[0]
    assert torch.equal(M.keep_k(S, 500, "row"), expected[3])
    assert torch.equal(M.keep_k(S, 200, "column"), expected[4])
    assert torch.equal(M.keep_k(S, 200_000, "matrix"), expected[5])
    assert torch.equal(M.keep_nm(S, 2, 4), expected[6])


# ---- degenerate and bad input ----


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)], ids=str)
def test_empty_matrices(isa, shape):
    W, norms = torch.empty(shape), torch.ones(shape[1])
    for method in METHODS:
        assert score(method, W, norms).shape == shape
    for along in ("row", "column", "matrix"):
        assert M.keep_k(W, 0, along).shape == shape
    assert M.keep_nm(W, 2, 4).shape == shape
    assert M.keep_nm(W, 2, 4, "outputs").shape == shape


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("at", [(0, 0), (17, 39), (5, 21)], ids=str)
def test_nan_is_refused_with_its_place(isa, at, sign):
    scores = randn(20, 40)
    scores[at] = math.copysign(math.nan, sign)
    scores[19, 39] = math.nan  # a later one must not be the one named
    place = rf"scores \[20, 40\] is NaN at row {at[0]}, column {at[1]}"
    for along in ("row", "column", "matrix"):
        for k in (0, 10, size_of(scores, along)):
            with pytest.raises(ValueError, match=place):
                M.keep_k(scores, k, along)
    for m in (4, 5):
        for along in ("inputs", "outputs"):
            with pytest.raises(ValueError, match=place):
                M.keep_nm(scores, 2, m, along)


S45 = torch.zeros(4, 5)
BAD = {
    "cannot keep 6 of the 5 scores of a row": lambda: M.keep_k(S45, 6),
    "cannot keep -1 of the 4 scores of a column": lambda: M.keep_k(S45, -1, "column"),
    "cannot keep 21 of the 20 scores of a matrix": lambda: M.keep_k(S45, 21, "matrix"),
    "along is 'rows' but must be row, column or matrix": lambda: M.keep_k(S45, 1, "rows"),
    "along is 'row' but must be inputs or outputs": lambda: M.keep_nm(S45, 2, 4, "row"),
    "2:4 along the inputs needs a multiple of 4 but there are 5": lambda: M.keep_nm(S45, 2, 4),
    "1:3 along the outputs needs a multiple of 3": lambda: M.keep_nm(S45, 1, 3, "outputs"),
    "N:M is 4:4 but must satisfy 1 <= N < M <= 32": lambda: M.keep_nm(S45, 4, 4),
    "N:M is 0:4": lambda: M.keep_nm(S45, 0, 4),
    "N:M is 1:33": lambda: M.keep_nm(S45, 1, 33),
    "scores must be float32 but is bfloat16": lambda: M.keep_k(S45.bfloat16(), 1),
    r"scores must have 2 dimensions but is float32 \[5\]": lambda: M.keep_k(S45[0], 1),
    r"scores \(float32 \[5, 4\] on cpu\) is not contiguous": lambda: M.keep_k(S45.t(), 1),
    r"norms has 4 entries but W has 5 columns": lambda: M.wanda(S45, torch.ones(4)),
    "norms must be float32 but is float64": lambda: M.ria(S45, torch.ones(5).double()),
    "W is float64 but must be one of float32, float16, bfloat16": lambda: M.magnitude(S45.double()),
    r"W must have 2 dimensions but is float32 \[2, 2, 5\]": lambda: M.ria(
        S45.reshape(2, 2, 5), torch.ones(5)
    ),
    r"W \(float32 \[5, 4\] on cpu\) is not contiguous": lambda: M.magnitude(S45.t()),
    "the score 'best' must be magnitude, wanda or ria": lambda: M.mask_score(S45, "best", None, 1),
    "the score 'wanda' needs norms": lambda: M.mask_score(S45, "wanda", None, 1.0),
    "requires grad": lambda: M.magnitude(S45.clone().requires_grad_()),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_gets_one_sentence(sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        BAD[sentence]()
    assert "\n" not in str(caught.value)


# ---- torch.library ----


def test_opcheck():
    W, norms = randn(8, 12), torch.ones(12)
    torch.library.opcheck(M.mask_score, (W, "magnitude", None, 1.0))
    torch.library.opcheck(M.mask_score, (W, "ria", norms, 0.5))
    torch.library.opcheck(M.mask_keep_k, (W, 5, "row"))
    torch.library.opcheck(M.mask_keep_nm, (W, 2, 4, "inputs"))


def wanda_2_4(W: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    return W * M.keep_nm(M.wanda(W, norms), 2, 4) * M.keep_k(M.magnitude(W), 6)


def test_compiles_into_one_graph():
    compiled = torch.compile(wanda_2_4, fullgraph=True, backend="aot_eager")
    W, norms = randn(8, 12), torch.ones(12)
    assert torch.equal(compiled(W, norms), wanda_2_4(W, norms))
    with pytest.raises(RuntimeError, match="scores contain a NaN"):
        compiled(W * math.nan, norms)


# ---- the GPU against its CPU twin ----


@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_scores(method, dtype):
    for shape in [*SHAPES, (1000, 4100), (3, 70001)]:
        W, norms = randn(*shape).to(dtype), randn(shape[1], seed=1).abs()
        S = score(method, W.cuda(), norms.cuda())
        assert_one_rounding(S.cpu(), M.reference_score(W, method, norms))
        assert torch.equal(S, score(method, W.cuda(), norms.cuda()))


@pytest.mark.cuda
@pytest.mark.parametrize("along", ["row", "column", "matrix"])
def test_cuda_keep_k(along):
    for shape in [*SHAPES, (1000, 4100), (3, 70001), (3000, 33)]:
        smooth = randn(*shape)
        for scores in (smooth, (smooth * 2).round(), smooth.bfloat16().float()):
            n = size_of(scores, along)
            for k in {0, 1, n // 3, n - 1, n}:
                ours = M.keep_k(scores.cuda(), k, along)
                assert torch.equal(ours.cpu(), M.keep_k(scores, k, along)), (shape, k)


@pytest.mark.cuda
@pytest.mark.parametrize("along", ["inputs", "outputs"])
@pytest.mark.parametrize("m", range(2, 33))
def test_cuda_keep_nm(along, m):
    for rows, cols in ((m, 37 * m), (3 * m, m), (20 * m, 70 * m)):
        smooth = randn(rows, cols)
        for scores in (smooth, (smooth * 2).round()):
            for n in {1, m // 2, m - 1}:
                ours = M.keep_nm(scores.cuda(), n, m, along)
                assert torch.equal(ours.cpu(), M.keep_nm(scores, n, m, along))


@pytest.mark.cuda
def test_cuda_names_the_first_nan():
    scores = randn(20, 40)
    scores[5, 21] = scores[19, 39] = math.nan
    calls = [lambda a=a: M.keep_k(scores.cuda(), 4, a) for a in ("row", "column", "matrix")]
    calls += [lambda a=a: M.keep_nm(scores.cuda(), 2, 4, a) for a in ("inputs", "outputs")]
    for call in calls:
        with pytest.raises(ValueError, match="NaN at row 5, column 21"):
            call()


@pytest.mark.cuda
def test_cuda_refuses_mixed_devices():
    with pytest.raises(ValueError, match="different devices"):
        M.wanda(torch.zeros(4, 5, device="cuda"), torch.ones(5))
