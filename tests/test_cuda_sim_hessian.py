"""The CUDA kernels of the hessian room in the simulator, against double precision."""

import pytest
import torch
from cuda_sim import build
from cuda_sim.simulator import Simulator
from second_moment import bound, cuda_bound

from distaya_ext.ops import hessian as room
from distaya_ext.ops.hessian import column_sq_, hessian_, symmetrize_

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
# tokens, columns: one of each, a slice of 32 tokens more or less, warp tiles of 64 and panels of
# 128 columns with a rest, rows on and off 16 bytes; 5 panels: every kind of tile
SHAPES = [(1, 1), (7, 17), (16, 16), (17, 7), (130, 130), (33, 300), (300, 64), (65, 520)]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_weights(kind: str, tokens: int) -> torch.Tensor | None:
    """sequences: one weight each and 3 of 48 tokens padding; mixed: all different, some 0."""
    at = torch.arange(tokens)
    if kind == "none":
        return None
    if kind == "constant":
        return torch.full((tokens,), 0.7)
    if kind == "sequences":
        return torch.where(at % 48 < 45, torch.tensor([0.3, 2.7, 1.0])[at // 48 % 3], 0.0)
    if kind == "padded":  # whole slices of padding, then one weight and padding in one slice
        return torch.where(at % 150 < 100, 1.3, 0.0)
    w = torch.rand(tokens, generator=torch.Generator().manual_seed(9))
    w[3::5] = 0
    return w


KINDS = ["none", "constant", "sequences", "padded", "mixed"]


def check(simulator, H: torch.Tensor, X: torch.Tensor, weights: torch.Tensor | None) -> None:
    """hessian_ on H: upper triangle within the bound, the rest untouched to the bit."""
    before, expected = H.clone(), room.reference(H, X, weights)
    limit = cuda_bound(H, X, weights).triu()
    if weights is not None:
        X = X.clone()
        X[weights == 0] = float("nan")
    with simulator.use():
        hessian_(H, X, weights)
    error = (H.double() - expected).triu().abs()
    assert (error <= limit).all(), f"off by {error.max():.3g}, limit {limit.max():.3g}"
    assert torch.equal(H.tril(-1), before.tril(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_double_precision(simulator, shape, dtype):
    tokens, columns = shape
    check(simulator, rand(columns, columns, seed=1), rand(tokens, columns).to(dtype), None)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [40, 51])
def test_weights(simulator, dtype, kind, columns):
    """Tokens of weight 0 hold NaN."""
    X = rand(230, columns).to(dtype)
    check(simulator, rand(columns, columns, seed=1), X, some_weights(kind, len(X)))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_small_and_large_values(simulator, kind):
    """Columns of 1e-6 beside columns of 100: each element keeps its own relative error."""
    X = rand(97, 40).half()
    X[:, ::2] *= 100
    X[:, 1::2] *= 1e-6
    check(simulator, torch.zeros(40, 40), X, some_weights(kind, len(X)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_promoted(simulator, dtype):
    """Ones after a 2^24, each of which is lost in fp32: the bound allows for those of one run."""
    X = torch.ones(1000, 1, dtype=dtype)
    X[0] = 2.0**12
    check(simulator, torch.zeros(1, 1), X, None)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_any_alignment_of_rows(simulator, dtype, offset):
    """C a multiple of 8, X off 16 bytes; H off 8, also where a warp's 64 x 64 are all there."""
    X = rand(40 * 136 + offset).to(dtype)[offset:].view(40, 136)
    H = torch.zeros(136 * 136 + 1)[1:].view(136, 136)
    check(simulator, H, X, some_weights("padded", len(X)))


@pytest.mark.parametrize("dtype", HALVES)
def test_every_tile_once(simulator, dtype):
    """19 panels: more than a group of columns. One token of small integers: exact."""
    columns = 19 * 128 - 3
    X = (torch.arange(columns) % 7 - 3.0).to(dtype)[None]
    H = torch.zeros(columns, columns)
    with simulator.use():
        hessian_(H, X, torch.tensor([2.0]))
    assert torch.equal(H, 2 * torch.outer(X[0].float(), X[0].float()).triu())


def test_more_tokens_than_a_launch_takes(simulator):
    """2^30 of them are made 40: the rest begins with its own tokens and weights."""
    path = "csrc/hessian/hessian_cuda.cu"
    text = (build.ROOT / path).read_text()
    assert text.count("kMost = 1 << 30;") == 1
    split = Simulator(build.build({path: text.replace("kMost = 1 << 30;", "kMost = 40;")}))
    X = rand(97, 24).half()
    for kind in ("none", "mixed"):
        check(split, rand(24, 24, seed=1), X, some_weights(kind, len(X)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_reaches_its_row_and_column_only(simulator, dtype, bad):
    X = rand(65, 53).to(dtype)
    X[64, 5] = bad
    tainted = torch.zeros(53, 53, dtype=torch.bool)
    tainted[5, 5:] = tainted[:6, 5] = True
    for kind in ("none", "mixed"):
        H = torch.zeros(53, 53)
        with simulator.use():
            hessian_(H, X, some_weights(kind, 65))
        assert torch.equal(~H.isfinite(), tainted)
        if kind == "none":
            assert H[5, 5].isnan() if bad != bad else H[5, 5] == bad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 20, 63])
def test_weights_that_no_check_refuses(simulator, dtype, at):
    """A NaN weight gives NaN everywhere, a negative one counts as it is; 0 is nothing."""
    X, before = rand(64, 24).to(dtype), rand(24, 24, seed=1)
    weights = torch.ones(64)
    weights[at] = -0.5
    weights[10:13] = 0
    H = before.clone()
    with simulator.use():
        hessian_(H, X, weights)
    x = X.double()
    expected = before.double() + (x.t() @ (weights.double()[:, None] * x)).triu()
    limit = cuda_bound(before, X, weights.abs())
    assert ((H - expected).triu().abs() <= limit.triu()).all()
    weights[at] = float("nan")
    with simulator.use():
        hessian_(H, X, weights)
    assert H[torch.ones(24, 24).triu() == 1].isnan().all()
    H = before.clone()
    with simulator.use():
        hessian_(H, torch.full_like(X, float("nan")), torch.zeros(64))
    assert torch.equal(H, before)


@pytest.mark.parametrize("kind", ["none", "sequences"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [40, 51])
def test_the_same_bits_under_every_schedule(simulator, dtype, kind, columns):
    X, weights = rand(150, columns).to(dtype), some_weights(kind, 150)

    def run():
        H, s = rand(columns, columns, seed=1), torch.zeros(columns)
        hessian_(H, X, weights)
        column_sq_(s, X, weights)
        symmetrize_(H)
        return torch.cat([H.flatten(), s])

    simulator.same_always(run)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_same_bits_under_every_schedule_of_many_tiles(simulator, dtype):
    X = rand(40, 400).to(dtype)

    def run():
        H = rand(400, 400, seed=1)
        hessian_(H, X)
        return H

    simulator.same_always(run)


@pytest.mark.parametrize("kind", ["none", "sequences", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (70, 33), (700, 40), (16500, 1)], ids=str)
def test_column_squares(simulator, shape, dtype, kind):
    tokens, columns = shape
    X, weights = rand(tokens, columns).to(dtype), some_weights(kind, tokens)
    X[64 * 256 :] *= 100  # the second run of each of 64 threads
    before = rand(columns, seed=2).abs()
    expected = room.reference(before.diag(), X, weights).diagonal()
    limit = bound(before.diag(), X, weights).diagonal()
    if weights is not None:
        X[weights == 0] = float("nan")
    s = before.clone()
    with simulator.use():
        column_sq_(s, X, weights)
    assert ((s - expected).abs() <= limit).all()


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 100])
def test_symmetrize(simulator, columns):
    H = rand(columns, columns)
    expected = H.triu() + H.triu(1).t()
    with simulator.use():
        symmetrize_(H)
    assert torch.equal(H, expected)
