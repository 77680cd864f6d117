"""solve: B (R Rᵀ)⁻¹ by substitution, against float64 with the bound of cholesky.h.

Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., theorem 8.5: whatever R is, each
row of the computed solution solves a system whose R is off by (n + 3) u |R| at most, so the
residual of both sweeps together is at most 2 (n + 3) u |X| |R| |R|ᵀ.
"""

import pytest
import torch
from test_cholesky import UNIT, gram, layer_norm_gram

from distaya_ext.errors import InputError
from distaya_ext.ops import cholesky as room

# one column; a block of 96 and its neighbours, groups of 8 columns; the slice of 384; several
SIZES = [1, 2, 7, 95, 96, 97, 191, 384, 389, 801]
ROWS = [1, 5, 33]  # fewer than a vector, and more rows than two of them


def rows_of(rows: int, n: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))


def check_solution(X: torch.Tensor, B: torch.Tensor, R: torch.Tensor, more_steps: int = 3) -> None:
    """The residual within 2 (n + more_steps) u |X| |R| |R|ᵀ, 1 % for higher orders."""
    n, X, R = len(R), X.double(), R.double().triu()
    error = (X @ R @ R.T - B.double()).abs()
    bound = 2.02 * (n + more_steps) * UNIT * (X.abs() @ R.abs() @ R.abs().T)
    assert bool(X.isfinite().all())
    excess = (error - bound).max()
    assert excess <= 0, f"off by {error.max():.3g}, {excess:.3g} over the bound"


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("n", SIZES)
def test_residual_meets_the_bound(isa, n, rows):
    B, factor = rows_of(rows, n), room.cholesky(gram(n, 2 * n + 8))
    check_solution(room.solve(B, factor), B, factor.R)


def test_close_to_double_precision():
    """Forward: |X - exact| <= |residual| |(R Rᵀ)⁻¹|, so a few cond u of the exact solution."""
    H = gram(389, 1000)
    B, factor = rows_of(40, 389), room.cholesky(H)
    exact, R = room.solve_reference(B, factor.R), factor.R.double()
    X = room.solve(B, factor)
    inverse = torch.linalg.inv(R @ R.T).abs()
    bound = 2.02 * 392 * UNIT * (X.double().abs() @ R.abs() @ R.abs().T @ inverse)
    assert bool(((X - exact).abs() <= bound).all())
    torch.testing.assert_close(X, exact.float(), rtol=0, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("damp", [0.01, 1e-5])
def test_hardly_definite_hessians(isa, damp):
    few_tokens, norm = gram(300, 60), layer_norm_gram(300)
    dead = norm.clone()
    dead[[0, 3, 250, 299]] = 0
    dead[:, [0, 3, 250, 299]] = 0
    for H in (few_tokens, norm, dead):
        B, factor = rows_of(9, 300), room.cholesky(H, damp)
        check_solution(room.solve(B, factor), B, factor.R)


@pytest.mark.parametrize("tokens", [1, 40, 200])
def test_floored_pivots(isa, tokens):
    """Undamped rank deficiency: pivots of 1e-7 of the mean beside ones a million times as large."""
    factor = room.cholesky(gram(450, tokens), damp=0.0)
    assert factor.floored > 0
    B = rows_of(17, 450)
    check_solution(room.solve(B, factor), B, factor.R)


def test_columns_of_very_different_size(isa):
    scale = torch.logspace(3, -3, 450)
    H = gram(450, 1000) * scale[:, None] * scale
    B, factor = rows_of(17, 450) * scale, room.cholesky(H, damp=0.0, floor=1e-30)
    check_solution(room.solve(B, factor), B, factor.R)


def test_recovers_what_was_multiplied():
    """Integers through an R of small integers: every step is exact."""
    generator = torch.Generator().manual_seed(0)
    R = torch.randint(-1, 2, (200, 200), generator=generator).float().triu(1)
    R *= torch.rand(200, 200, generator=generator) < 0.02
    R += torch.eye(200) * 2
    X = torch.randint(-3, 4, (7, 200), generator=generator).float()
    B = X @ R @ R.T
    assert torch.equal(room.solve(B, R), X)


def test_a_row_does_not_depend_on_the_others(isa):
    B, factor = rows_of(70, 389), room.cholesky(gram(389, 900))
    together = room.solve(B, factor)
    for rows in (slice(0, 1), slice(5, 38), slice(69, 70)):
        assert torch.equal(room.solve(B[rows], factor), together[rows])


def test_same_bits_for_any_thread_count(isa):
    B, factor = rows_of(300, 801), room.cholesky(gram(801, 900))
    before, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(room.solve(B, factor))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_only_the_upper_triangle_of_r_is_read(isa):
    B, R = rows_of(5, 300), room.cholesky(gram(300, 700)).R
    expected = room.solve(B, R)
    R[torch.ones(300, 300).tril(-1).bool()] = float("nan")
    assert torch.equal(room.solve(B, R), expected)


def test_takes_a_factor_a_late_one_or_r():
    H, B = gram(130, 300), rows_of(3, 130)
    factor, kept = room.cholesky(H), B.clone()
    expected = room.solve(B, factor)
    assert torch.equal(B, kept)
    assert torch.equal(room.solve(B, factor.R), expected)
    assert torch.equal(room.solve(B, room.cholesky_late(H)), expected)
    assert torch.equal(room.solve(B.t().contiguous().t(), factor), expected)
    room.solve_(B, factor.R)
    assert torch.equal(B, expected)


def test_what_is_not_finite_stays_in_its_row(isa):
    B, factor = rows_of(40, 200), room.cholesky(gram(200, 500))
    clean = room.solve(B, factor)
    B[17, 120] = float("nan")
    X = room.solve(B, factor)
    others = torch.arange(40) != 17
    assert bool(X[17].isnan().all())
    assert torch.equal(X[others], clean[others])


def test_nothing_and_one():
    R = torch.tensor([[2.0]])
    assert room.solve(torch.tensor([[8.0]]), R).item() == 2
    assert room.solve(torch.zeros(0, 1), R).shape == (0, 1)
    assert room.solve(torch.zeros(3, 0), torch.zeros(0, 0)).shape == (3, 0)


def test_bad_input_is_refused_with_a_sentence():
    B, R = torch.zeros(2, 4), torch.eye(4)
    cases = [
        (lambda: room.solve(B, torch.zeros(4, 3)), "R must be square but is 4 x 3"),
        (lambda: room.solve(B, torch.eye(3)), "B .* must have as many columns as R"),
        (lambda: room.solve(B[0], R), "B must have 2 dimensions"),
        (lambda: room.solve(B.half(), R), "B must be float32 but is float16"),
        (lambda: room.solve(B, R.double()), "R must be float32 but is float64"),
        (lambda: room.solve(B, torch.eye(8)[::2, ::2]), "R .* is not contiguous"),
        (lambda: room.solve_(torch.zeros(2, 8)[:, ::2], R), "B .* is not contiguous"),
        (lambda: room.solve_(R, R), "B and R must not be the same tensor"),
        (lambda: room.solve(B, torch.diag(torch.tensor([1.0, 0, 1, 1]))), "R has no inverse"),
        (lambda: room.solve(B, R * float("nan")), "R has no inverse"),
    ]
    for call, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            call()
    with pytest.raises(InputError):
        room.solve(B, torch.zeros(4, 4))


def test_the_op_is_registered_properly_and_compiles():
    B, R = rows_of(3, 100), room.cholesky(gram(100, 200)).R
    torch.library.opcheck(torch.ops.distaya.cholesky_solve_.default, (B, R))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def solved(B, R):
        X = B.clone()
        room.solve_(X, R)
        return X * 2

    assert torch.equal(solved(B, R), 2 * room.solve(B, R))


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [*ROWS, 300])
@pytest.mark.parametrize("n", [*SIZES, 1500])
def test_cuda_meets_its_bound(n, rows):
    B, factor = rows_of(rows, n).cuda(), room.cholesky(gram(n, 2 * n + 8).cuda())
    X = room.solve(B, factor)
    assert torch.equal(X, room.solve(B, factor))
    check_solution(X.cpu(), B.cpu(), factor.R.cpu(), more_steps=67)
