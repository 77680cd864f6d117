"""Aim.weights against least squares in float64, with bounds from the rounding of its parts."""

import pytest
import torch
from second_moment import factor as moment_factor

from distaya_ext.compress.aim import Aim, shrink
from distaya_ext.ops.cholesky import cholesky_late
from distaya_ext.ops.hessian import Hessian

ROWS, COLUMNS, TOKENS, DAMP = 24, 40, 500, 0.1
CPU = torch.device("cpu")


def problem(seed=0, columns=COLUMNS, tokens=TOKENS, dtype=torch.float32):
    """W, inputs now x, dense inputs x_d near x, and outputs wanted y of another layer."""
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=make) * torch.logspace(0, -0.7, columns)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=make) / columns**0.5
    dense = (x + 0.2 * torch.randn(tokens, columns, generator=make)) @ mix
    W = torch.randn(ROWS, columns, generator=make)
    y = dense @ W.T + 0.5 * torch.randn(tokens, ROWS, generator=make)
    weights = torch.tensor([0.0, 0.4, 2.0])[torch.arange(tokens) // 20 % 3]  # as of languages
    return W, x.to(dtype), dense.to(dtype), y.to(dtype), weights


def moment(x, weights):
    if weights is None:
        gathered = Hessian(x.shape[1])
        gathered.add(x)
        return gathered.finish()
    H = torch.zeros(x.shape[1], x.shape[1])
    hessian_sum(H, x, weights)
    return H


def hessian_sum(H, x, weights):
    """The weighted mean, its float64 value rounded once."""
    w = weights.double()[:, None]
    H.copy_(((x.double() * w).T @ x.double()) / w.sum())


def aimed(W, x, other, weights, *, outputs, parts=1, damp=DAMP, last=True):
    """W', and the H and factor it was made with."""
    aim = Aim(len(W), W.shape[1], CPU, outputs=outputs)
    split = [None] * parts if weights is None else weights.chunk(parts)
    for a, b, w in zip(other.chunk(parts), x.chunk(parts), split, strict=True):
        aim.add(a, b, w)
    H = moment(x, weights)
    factor = cholesky_late(H, damp)
    return aim.weights(W, H, factor.R, last=last), H, aim


def least_squares(W, x, y, weights, H, damp=DAMP):
    """argmin over V of mean |y - V x|^2 + ridge |V - W|^2, by QR of the tokens and the ridge."""
    w = torch.ones(len(x)).double() if weights is None else weights.double()
    w = (w / w.sum()).sqrt()[:, None]
    ridge = (damp * H.double().diagonal().mean()).sqrt()
    eye = torch.eye(x.shape[1], dtype=torch.float64)
    A = torch.cat([w * x.double(), ridge * eye])
    B = torch.cat([w * y, ridge * W.double().T])
    return torch.linalg.lstsq(A, B, driver="gelsd").solution.T


def bound(W, x, other, shift, H, weights, outputs, damp=DAMP):
    """What W' may be away from the exact one, Frobenius.

    The moments lose f times the sum of sizes (hessian.h), the product with W and the difference a
    rounding per term, the factor and its two solves 3 n u trace H' (Higham 10.3, 8.5).
    """
    f, n, u = moment_factor(x, weights), x.shape[1], 2.0**-24
    w = torch.ones(len(x)).double() if weights is None else weights.double()
    w = (w / w.sum())[:, None]
    size = torch.linalg.matrix_norm
    X, O, V = x.double().abs(), other.double().abs(), size(W.double())  # noqa: E741
    HH, cross = size((X * w).T @ X), size((O * w).T @ X)
    if outputs:
        lost = f * cross + V * (f + (n + 2) * u) * HH
    else:
        lost = V * (f * cross + f * HH + (n + 2) * u * (cross + HH))
    damped = H.double() + damp * H.double().diagonal().mean() * torch.eye(n)
    lost += size(shift) * (f * HH + 3 * n * u * damped.trace())
    inverse = 1 / torch.linalg.eigvalsh(damped)[0]
    return lost * inverse + 2 * u * (size(shift) + V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("outputs", [True, False])
def test_against_least_squares(outputs, weighted, dtype):
    for seed in range(3):
        W, x, dense, y, weights = problem(seed, dtype=dtype)
        weights = weights if weighted else None
        other = y if outputs else dense
        got, H, _ = aimed(W, x, other, weights, outputs=outputs)
        target = y.double() if outputs else dense.double() @ W.double().T
        best = least_squares(W, x, target, weights, H)
        want = W + (1 - COLUMNS / TOKENS) * (best - W)
        away = torch.linalg.matrix_norm(got.double() - want)
        limit = bound(W, x, other, best - W, H, weights, outputs)
        moved = torch.linalg.matrix_norm(want - W)
        assert away <= limit
        assert limit < 0.04 * moved  # the bound tells a forgotten share (8 % here) from rounding


@pytest.mark.parametrize(
    "tokens, columns, share",
    [(0, 4, 0.0), (1, 4, 0.0), (4, 4, 0.0), (5, 4, 0.2), (8, 4, 0.5), (400, 4, 0.99)],
)
def test_share(tokens, columns, share):
    assert shrink(tokens, columns) == pytest.approx(share, abs=1e-15)


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("tokens", [7, COLUMNS])
def test_too_few_tokens_change_nothing(outputs, tokens):
    W, x, dense, y, _ = problem(tokens=tokens)
    got, _, _ = aimed(W.bfloat16(), x, y if outputs else dense, None, outputs=outputs)
    assert got.dtype == torch.float32 and torch.equal(got, W.bfloat16().float())


@pytest.mark.parametrize("outputs", [True, False])
def test_share_counts_tokens_not_weights(outputs):
    """Twice the weights, the same bits."""
    W, x, dense, y, weights = problem()
    other = y if outputs else dense
    one, _, _ = aimed(W, x, other, weights, outputs=outputs)
    two, _, _ = aimed(W, x, other, 2 * weights, outputs=outputs)
    assert torch.equal(one, two)


def test_tokens_of_weight_zero_are_as_if_absent_but_for_the_share():
    W, x, dense, _, weights = problem()
    some = weights != 0
    all_of, H, _ = aimed(W, x, dense, weights, outputs=False)
    few, _, _ = aimed(W, x[some], dense[some], weights[some], outputs=False)
    ratio = shrink(TOKENS, COLUMNS) / shrink(int(some.sum()), COLUMNS)
    limit = 2 * bound(W, x, dense, few.double() - W, H, weights, False)
    assert torch.linalg.matrix_norm((all_of - W) - (few - W) * ratio) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [256, 500])
def test_equal_streams_change_nothing(dtype, tokens):
    W, x, _, _, _ = problem(tokens=tokens, dtype=dtype)
    got, _, _ = aimed(W, x, x, None, outputs=False)
    assert torch.equal(got, W)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("outputs", [True, False])
def test_several_readers_get_the_same(outputs, weighted):
    W, x, dense, y, weights = problem()
    weights = weights if weighted else None
    other = y if outputs else dense
    once, H, _ = aimed(W, x, other, weights, outputs=outputs)
    first, _, aim = aimed(W, x, other, weights, outputs=outputs, last=False)
    R = cholesky_late(H, DAMP).R
    second = aim.weights(W, H, R, last=False)
    third = aim.weights(W, H, R, last=True)
    assert all(torch.equal(once, other) for other in (first, second, third))
    with pytest.raises(ValueError, match="given up"):
        aim.weights(W, H, R)


def test_reading_some_rows_gives_those_rows():
    """Stacks of one stage take their own rows of what is wanted of a shared input."""
    W, x, dense, _, _ = problem()
    whole, H, _ = aimed(W, x, dense, None, outputs=False)
    _, _, aim = aimed(W, x, dense, None, outputs=False, last=False)
    R = cholesky_late(H, DAMP).R
    parts = [aim.weights(W[:9], H, R, last=False), aim.weights(W[9:], H, R)]
    limit = bound(W, x, dense, whole.double() - W, H, None, False)
    assert torch.linalg.matrix_norm(torch.cat(parts) - whole) <= 2 * limit


@pytest.mark.parametrize("outputs", [True, False])
def test_any_number_of_threads(outputs):
    W, x, dense, y, weights = problem(columns=200, tokens=900)
    other, before, found = (y if outputs else dense), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(aimed(W, x, other, weights, outputs=outputs, parts=3)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_it_brings_the_outputs_closer():
    """On tokens that were not gathered, too."""
    W, x, dense, y, _ = problem(tokens=2 * TOKENS)
    for outputs, other, want in ((True, y, y), (False, dense, dense @ W.T)):
        got, _, _ = aimed(W, x[:TOKENS], other[:TOKENS], None, outputs=outputs, damp=0.01)
        errors = [(x[TOKENS:] @ V.T - want[TOKENS:]).square().mean() for V in (W, got)]
        assert errors[1] < 0.9 * errors[0]
