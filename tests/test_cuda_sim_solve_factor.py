"""solve_ on CUDA, simulated: the bound of cholesky.h, every schedule the same bits."""

import pytest
import torch
from test_cholesky import gram, layer_norm_gram
from test_solve_factor import check_solution, rows_of

from distaya_ext.errors import InputError
from distaya_ext.ops import cholesky as room

# squares of 32, blocks of 128, slices of 256, and their neighbours
SIZES = [1, 2, 31, 32, 33, 95, 127, 128, 129, 256, 257, 300]


def check(simulator, B: torch.Tensor, factor: room.Factor) -> torch.Tensor:
    with simulator.use():
        X = room.solve(B, factor)
    check_solution(X, B, factor.R, more_steps=67)
    return X


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("n", SIZES)
def test_residual_meets_the_bound(simulator, n, rows):
    B, factor = rows_of(rows, n), room.cholesky(gram(n, 2 * n + 8))
    X = check(simulator, B, factor)
    here = room.solve(B, factor)
    torch.testing.assert_close(X, here, rtol=0, atol=1e-4 * float(here.abs().max()))


def test_several_slices(simulator):
    check(simulator, rows_of(40, 650), room.cholesky(gram(650, 1300)))


@pytest.mark.parametrize("damp", [0.01, 1e-5])
def test_hardly_definite_hessians(simulator, damp):
    for H in (gram(270, 60), layer_norm_gram(270)):
        check(simulator, rows_of(9, 270), room.cholesky(H, damp))


@pytest.mark.parametrize("tokens", [1, 40, 150])
def test_floored_pivots(simulator, tokens):
    factor = room.cholesky(gram(270, tokens), damp=0.0)
    assert factor.floored > 0
    check(simulator, rows_of(9, 270), factor)


def test_columns_of_very_different_size(simulator):
    scale = torch.logspace(3, -3, 270)
    H = gram(270, 700) * scale[:, None] * scale
    factor = room.cholesky(H, damp=0.0, floor=1e-30)
    check(simulator, rows_of(9, 270) * scale, factor)


def test_recovers_what_was_multiplied(simulator):
    """Integers through an R of small integers: every step is exact, also in tf32."""
    generator = torch.Generator().manual_seed(0)
    R = torch.randint(-1, 2, (200, 200), generator=generator).float().triu(1)
    R *= torch.rand(200, 200, generator=generator) < 0.02
    R += torch.eye(200) * 2
    X = torch.randint(-3, 4, (7, 200), generator=generator).float()
    with simulator.use():
        assert torch.equal(room.solve(X @ R @ R.T, R), X)


def test_all_schedules_give_the_same_bits(simulator):
    B, R = rows_of(40, 290), room.cholesky(gram(290, 600)).R
    simulator.same_always(lambda: room.solve(B, R))


def test_only_the_upper_triangle_of_r_is_read(simulator):
    B, R = rows_of(5, 200), room.cholesky(gram(200, 700)).R
    with simulator.use():
        expected = room.solve(B, R)
        R[torch.ones(200, 200).tril(-1).bool()] = float("nan")
        assert torch.equal(room.solve(B, R), expected)


def test_what_is_not_finite_stays_in_its_row(simulator):
    B, factor = rows_of(40, 200), room.cholesky(gram(200, 500))
    with simulator.use():
        clean = room.solve(B, factor)
        B[17, 120] = float("nan")
        X = room.solve(B, factor)
    others = torch.arange(40) != 17
    assert bool(X[17].isnan().all())
    assert torch.equal(X[others], clean[others])


def test_nothing_and_one_and_no_inverse(simulator):
    with simulator.use():
        assert room.solve(torch.tensor([[8.0]]), torch.tensor([[2.0]])).item() == 2
        assert room.solve(torch.zeros(0, 1), torch.ones(1, 1)).shape == (0, 1)
        assert room.solve(torch.zeros(3, 0), torch.zeros(0, 0)).shape == (3, 0)
        with pytest.raises(InputError, match="R has no inverse"):
            room.solve(torch.zeros(2, 4), torch.zeros(4, 4))
