"""ADMM masks against float64 as published: one iteration by its bound, whole runs by their loss.

The check_* functions are also run on the simulated CUDA kernels (test_cuda_sim_refit.py).
"""

import pytest
import torch
from test_refit import DTYPES, U, hessian, loss, masked, terms

from distaya_ext.errors import InputError, UsageError
from distaya_ext.ops import mask as M
from distaya_ext.ops import refit as room
from distaya_ext.ops.obs import obs
from distaya_ext.ops.refit import admm, refit

WAYS = {
    "half": {"sparsity": 0.5},
    "70% of each row": {"sparsity": 0.7, "along": "row"},
    "2:4": {"nm": (2, 4)},
    "5:8": {"nm": (5, 8)},
}


def weights(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def power_law(cols: int, power: float, seed: int = 0) -> torch.Tensor:
    """H of inputs whose covariance has eigenvalues i^-power in a random basis."""
    make = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(cols, cols, generator=make, dtype=torch.float64))[0]
    values = torch.arange(1, cols + 1, dtype=torch.float64) ** -power
    return ((basis * values) @ basis.T).float()


def check_iteration(rows: int, cols: int, most: float) -> None:
    """G = (Y + rho (D - U)) inverse + U, each sum within its bound; X = |G|, the same bits."""
    G, Y, mask = weights(rows, cols), weights(rows, cols, seed=1), masked(rows, cols, "half")
    inverse = hessian(cols)
    for rho, ratio in ((0.5, 0.0), (3.0, 0.7)):
        after, X = G.clone(), torch.empty_like(G)
        room.admm_(after, X, mask, Y, inverse, rho, ratio)
        D, dual = G.double() * mask, ratio * G.double() * ~mask
        into = Y.double() + rho * (D - dual)
        size = Y.double().abs() + rho * (D + dual).abs()
        want = into @ inverse.double() + dual
        bound = (most + 6) * U * (size @ inverse.double().abs() + dual.abs())
        assert bool(((after - want).abs() <= bound).all())
        assert torch.equal(X, after.abs())


def check_product(rows: int, cols: int, most: float) -> None:
    C, X, B = weights(rows, cols), weights(rows, cols, seed=1), weights(cols, cols, seed=2)
    want = C.double() + X.double() @ B.double()
    bound = (most + 2) * U * (C.double().abs() + X.double().abs() @ B.double().abs())
    room.multiply_(C, X, B)
    assert bool(((C - want).abs() <= bound).all())


def check_run(rows: int, cols: int, way: str, iterations: int) -> None:
    """The masks of float64 but where a decision hung by rounding. Later decisions hang by earlier
    ones: after many iterations only the result is as good."""
    T, H = weights(rows, cols), power_law(cols, 0.7)
    D, mask = admm(T, H, iterations=iterations, **WAYS[way])
    D64, mask64 = room.reference_admm(T, H, iterations=iterations, **WAYS[way])
    assert not D[~mask].any()
    assert iterations > 5 or (mask != mask64).double().mean() <= 2e-3
    total, total64 = (float(loss(x, T, H).sum()) for x in (D, D64))
    assert abs(total - total64) <= (1e-3 if iterations <= 5 else 0.02) * total64


def check_counts() -> None:
    T, H = weights(13, 40), hessian(40)
    for share in (0.0, 1e-9, 0.31, 0.5, 0.999):
        mask = admm(T, H, sparsity=share, iterations=3)[1]
        assert int((~mask).sum()) == int(13 * 40 * share)
        mask = admm(T, H, sparsity=share, along="row", iterations=3)[1]
        assert bool(((~mask).sum(1) == int(40 * share)).all())
    for n, m in ((2, 4), (1, 2), (7, 8), (3, 5)):
        mask = admm(T, H, nm=(n, m), iterations=3)[1]
        assert bool((mask.view(13, -1, m).sum(2) == n).all())


@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (33, 400)], ids=str)
def test_iteration(shape, isa):
    check_iteration(*shape, terms(shape[1]))
    check_product(*shape, terms(shape[1]))


@pytest.mark.parametrize("iterations", [1, 4, 30])
@pytest.mark.parametrize("way", WAYS)
def test_run(way, iterations):
    check_run(40, 160, way, iterations)


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_rho_rises_in_geometric_steps(levels):
    """Earlier values have an iteration more where they do not divide."""
    T, H = weights(12, 40), hessian(40)
    D, mask = admm(T, H, nm=(2, 4), iterations=5, rho=(0.1, 1.6), levels=levels)
    D64, mask64 = room.reference_admm(T, H, nm=(2, 4), iterations=5, rho=(0.1, 1.6), levels=levels)
    assert torch.equal(mask, mask64)
    torch.testing.assert_close(D, D64.float(), rtol=1e-3, atol=1e-4)
    values = {1: [0.1], 2: [0.1, 1.6], 5: [0.1, 0.2, 0.4, 0.8, 1.6]}[levels]
    got = room._schedule((0.1, 1.6), 5, levels)
    assert [value for value, _ in got] == pytest.approx(values)
    assert [n for _, n in got] == {1: [5], 2: [3, 2], 5: [1] * 5}[levels]


def test_counts(isa):
    check_counts()


def test_no_iterations_are_the_projection_of_the_target():
    T, H = weights(9, 40), hessian(40)
    D, mask = admm(T, H, nm=(2, 4), iterations=0)
    assert torch.equal(mask, M.keep_nm((T * H.diagonal().sqrt()).abs(), 2, 4))
    torch.testing.assert_close(D, T * mask, rtol=4 * U, atol=0)
    start = weights(9, 40, seed=5)
    D, mask = admm(T, H, sparsity=0.5, iterations=0, start=start)
    torch.testing.assert_close(D, start * mask, rtol=4 * U, atol=0)


@pytest.mark.parametrize("power", [0.4, 0.7, 1.0])
@pytest.mark.parametrize("way", ["half", "2:4"])
def test_better_than_the_sweep_and_its_refit(way, power):
    """What it is for: masks chosen together with the weights beat those chosen one by one."""
    T, H = weights(64, 256), power_law(256, power)
    swept = obs(T, H, **WAYS[way])
    D, mask = admm(T, H, rho=(0.3, 1.0), **WAYS[way])
    plain, refitted = (
        float(loss(x, T, H).sum()) for x in (swept.W, refit(T, swept.mask, H, start=swept.W))
    )
    both = float(loss(refit(T, mask, H, start=D), T, H).sum())
    assert refitted < 0.98 * plain and both < 0.99 * refitted


def check_dead_columns() -> None:
    """Weights of inputs that never fired are the first to go, and nothing divides by zero."""
    T, H = weights(10, 40), hessian(40)
    dead = torch.tensor([0, 5, 6, 7, 39])
    H[dead] = H[:, dead] = 0
    D, mask = admm(T, H, sparsity=0.5, iterations=6)
    assert not mask[:, dead].any() and D.isfinite().all()
    D, mask = admm(T, H, nm=(2, 4), iterations=6)
    assert not D[:, dead].any() and bool((mask.view(10, -1, 4).sum(2) == 2).all())
    D, mask = admm(T, 0 * H, sparsity=0.5, iterations=6)
    assert not D.any() and int(mask.sum()) == 200


def test_dead_columns():
    check_dead_columns()


def test_singular_hessians():
    """Fewer tokens than inputs, hardly damped: still better than what it starts from."""
    T, H = weights(20, 200), hessian(200, tokens=40)
    for damp in (0.01, 1e-6):
        D, mask = admm(T, H, sparsity=0.5, damp=damp, rho=(0.3, 1.0))
        first, keep = admm(T, H, sparsity=0.5, iterations=0)
        assert D.isfinite().all()
        ours = loss(refit(T, mask, H, start=D), T, H).sum()
        assert ours < 0.97 * loss(refit(T, keep, H, start=first), T, H).sum()


def test_dtypes_strides_and_inputs_untouched():
    H = hessian(40)
    for dtype in DTYPES:
        T = weights(12, 40).to(dtype)
        D, mask = admm(T, H, nm=(2, 4), iterations=6)
        wide, same = admm(T.float(), H, nm=(2, 4), iterations=6)
        assert D.dtype == dtype and torch.equal(mask, same) and torch.equal(D, wide.to(dtype))
        strided, H_before, T_before = T.t().contiguous().t(), H.clone(), T.clone()
        again, _ = admm(strided, H.t().contiguous().t(), nm=(2, 4), iterations=6)
        assert torch.equal(again, D) and torch.equal(H, H_before) and torch.equal(T, T_before)


REFUSALS = {
    "neither": ({}, "either sparsity or nm"),
    "both": ({"sparsity": 0.5, "nm": (2, 4)}, "either sparsity or nm"),
    "sparsity 1": ({"sparsity": 1.0}, "below 1, not 1.0"),
    "sparsity nan": ({"sparsity": float("nan")}, "not nan"),
    "along": ({"sparsity": 0.5, "along": "column"}, "'matrix' or 'row', not 'column'"),
    "3:7": ({"nm": (3, 7)}, "3:7 along the inputs needs a multiple of 7 but there are 20"),
    "4:4": ({"nm": (4, 4)}, "N:M is 4:4"),
    "rho falls": ({"nm": (2, 4), "rho": (3.0, 0.03)}, "rho must rise .* not 3.0 to 0.03"),
    "rho 0": ({"nm": (2, 4), "rho": (0.0, 1.0)}, "rho must rise"),
    "levels": ({"nm": (2, 4), "levels": 0}, "levels must be at least 1, not 0"),
    "iterations": ({"nm": (2, 4), "iterations": -2}, "at least 0, not -2"),
    "damp": ({"nm": (2, 4), "damp": -1.0}, "damp must be a finite number >= 0 but is -1"),
    "damp nan": ({"nm": (2, 4), "damp": float("nan")}, "damp must be .* nan"),
    "start": ({"nm": (2, 4), "start": torch.ones(3, 20)}, r"start of \[3, 20\] does not fit"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(name):
    options, sentence = REFUSALS[name]
    with pytest.raises((InputError, UsageError, ValueError), match=sentence):
        admm(weights(8, 20), hessian(20), **options)


def test_refused_shapes():
    with pytest.raises(InputError, match=r"H of shape \[19, 19\] does not fit T of shape \[8, 20"):
        admm(weights(8, 20), hessian(19), nm=(2, 4))
    with pytest.raises(InputError, match=r"does not fit T of shape \[20\]"):
        admm(weights(8, 20)[0], hessian(20), nm=(2, 4))
