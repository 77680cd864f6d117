"""The cholesky room against float64, with bounds from error analysis.

Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed.: theorem 10.3 gives
|R Rᵀ - H'| <= c n u |R| |R|ᵀ, and (|R| |R|ᵀ)_ij <= sqrt(H'_ii H'_jj) by Cauchy-Schwarz; section
14.2 gives |U - R⁻¹| <= c n u |R⁻¹| |R| |R⁻¹|.
"""

import pytest
import torch

from distaya_ext.errors import InputError, UsageError
from distaya_ext.ops import cholesky as room

UNIT = 2.0**-24
# 1 row; odd; one block and its neighbours (96); across the slice of 384; several slices
SIZES = [1, 2, 7, 95, 96, 97, 191, 384, 389, 801]


def gram(n: int, tokens: int, seed: int = 0) -> torch.Tensor:
    X = torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed))
    X *= torch.logspace(0.5, -0.5, n)
    return X.T @ X / tokens


def layer_norm_gram(n: int) -> torch.Tensor:
    """Cohere's LayerNorm: mean subtracted, then scaled by w. 1/w is a null vector of H."""
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(3 * n, n, generator=generator)
    w = torch.rand(n, generator=generator) + 0.5
    X = (X - X.mean(1, keepdim=True)) * w
    return X.T @ X / (3 * n)


def damped(H: torch.Tensor, damp: float) -> torch.Tensor:
    H = H.triu().double()
    return H + H.triu(1).T + damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def residual(factor: room.Factor, H: torch.Tensor) -> float:
    """Largest |R Rᵀ - H'| / sqrt(H'_ii H'_jj) in units of (n + 3) u; at most 2 is expected."""
    A, R = damped(H, factor.damp), factor.R.double()
    scale = A.diagonal().sqrt()
    error = (R @ R.T - A).abs() / (scale[:, None] * scale)
    return float(error.max()) / ((len(A) + 3) * UNIT)


def check_inverses(R: torch.Tensor, U: torch.Tensor, inverse: torch.Tensor, steps: int) -> None:
    """U = R⁻¹ and inverse = Uᵀ U within their bounds, `steps` roundings deep."""
    R, U = R.double(), U.double()
    exact = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype), upper=True)
    bound = steps * UNIT * (exact.abs() @ R.abs() @ exact.abs())
    assert torch.equal(U, U.triu())
    assert bool(((U - exact).abs() <= bound).all())
    assert torch.equal(inverse, inverse.T)
    bound = steps * UNIT * (U.abs().T @ U.abs())
    assert bool(((inverse - U.T @ U).abs() <= bound).all())


def cuda_steps(n: int) -> int:
    """What stands for n + 3 in the bounds on CUDA (cholesky.h)."""
    return max(n, 48) + 3


def check_factor(H: torch.Tensor, damp: float = 0.01) -> room.Factor:
    factor = room.cholesky(H, damp)
    assert torch.equal(factor.R, factor.R.triu())
    assert bool((factor.R.diagonal() > 0).all())
    assert (factor.floored, factor.first_floored) == (0, -1)
    assert residual(factor, H) <= 2
    return factor


@pytest.mark.parametrize("n", SIZES)
def test_factor_and_inverses_meet_their_bounds(isa, n):
    H = gram(n, 2 * n + 8)
    factor = check_factor(H)
    U, inverse = room.inverse_factor(factor.R), room.inverse(factor.R)
    check_inverses(factor.R, U, inverse, n + 3)


def test_blocks_do_not_hide_in_averages():
    """The same bounds where columns differ by six orders of magnitude."""
    scale = torch.logspace(3, -3, 450)
    H = gram(450, 1000) * scale[:, None] * scale
    factor = room.cholesky(H, damp=0.0, floor=1e-30)
    assert factor.floored == 0
    assert residual(factor, H) <= 2


@pytest.mark.parametrize("damp", [0.01, 1e-3, 1e-5])
def test_singular_hessians_need_no_floor_when_damped(damp):
    few_tokens, norm = gram(500, 120), layer_norm_gram(500)
    dead = norm.clone()
    dead[[0, 3, 250, 499]] = 0
    dead[:, [0, 3, 250, 499]] = 0
    for H, zeros in ((few_tokens, 0), (norm, 0), (dead, 4)):
        assert check_factor(H, damp).dead == zeros


def test_u_is_the_textbook_factor():
    """U equals cholesky(cholesky_inverse(cholesky(H')), upper), no worse than torch's float32."""
    for H in (gram(400, 900), gram(400, 100), layer_norm_gram(400)):
        _, exact = room.reference(H)
        A = damped(H, 0.01).float()
        theirs = torch.cholesky_inverse(torch.linalg.cholesky(A))
        theirs = torch.linalg.cholesky(theirs, upper=True)
        ours = room.inverse_factor(room.cholesky(H).R)
        norm = exact.norm()
        error, theirs_error = ((ours - exact).norm() / norm, (theirs - exact).norm() / norm)
        assert error <= 2 * theirs_error + 1e-6, (error, theirs_error)
        inverse = room.inverse(room.cholesky(H).R)
        truth = torch.linalg.inv(damped(H, 0.01))
        assert (inverse - truth).norm() <= 1e-3 * truth.norm()


def test_reference_routes_agree():
    R, U = room.reference(gram(60, 200))
    torch.testing.assert_close(U @ R, torch.eye(60, dtype=R.dtype), atol=1e-12, rtol=0)


@pytest.mark.parametrize("damp", [0.01, 1e-5])
def test_losses_agree(damp):
    """1/2 |E R|² is 1/2 E H' Eᵀ within the residual's bound: (n + 3) u (sum |e_i| sqrt(H'_ii))²."""
    H = gram(389, 150)
    E = torch.randn(20, 389, generator=torch.Generator().manual_seed(2)).double()
    A, R = damped(H, damp), room.cholesky(H, damp).R.double()
    ours, exact = (E @ R).square().sum(1) / 2, (E @ A * E).sum(1) / 2
    bound = (389 + 3) * UNIT * (E.abs() @ A.diagonal().sqrt()).square()
    assert bool(((ours - exact).abs() <= bound).all())


def test_only_the_upper_triangle_is_read(isa):
    H = gram(300, 700)
    expected = room.cholesky(H)
    H[torch.ones(300, 300).tril(-1).bool()] = float("nan")
    factor = room.cholesky(H)
    assert torch.equal(factor.R, expected.R)
    R = expected.R + torch.full((300, 300), float("nan")).tril(-1).nan_to_num(7.0)
    assert torch.equal(room.inverse_factor(R), room.inverse_factor(expected.R))


def test_same_bits_for_any_thread_count(isa):
    H = gram(801, 900)
    results = []
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        R = room.cholesky(H).R
        results.append((R, room.inverse_factor(R), room.inverse(R)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_overwrite_works_in_place():
    H = gram(130, 300)
    expected = room.cholesky(H).R
    factor = room.cholesky(H, overwrite=True)
    assert factor.R is H
    assert torch.equal(H, expected)


def test_strided_input_is_copied():
    H = gram(130, 300)
    assert torch.equal(room.cholesky(H.T).R, room.cholesky(H.T.contiguous()).R)


def test_nothing_and_one():
    empty = room.cholesky(torch.zeros(0, 0))
    assert empty.R.shape == (0, 0) and (empty.floored, empty.mean_diag, empty.dead) == (0, 0.0, 0)
    assert room.inverse(empty.R).shape == (0, 0)
    one = room.cholesky(torch.tensor([[4.0]]), damp=0.0)
    assert one.R.item() == 2 and one.mean_diag == 4
    assert room.inverse_factor(one.R).item() == 0.5
    assert room.inverse(one.R).item() == 0.25


def test_floored_pivots_are_raised_and_counted(isa):
    H = torch.diag(torch.tensor([1.0, -0.5, 3.0, 1e-12, 0.0, 2.0]))
    factor = room.cholesky(H, damp=0.0, floor=1e-6)
    mean = 5.5 / 6
    raised = torch.tensor([1.0, 1e-6 * mean, 3.0, 1e-6 * mean, 1e-6 * mean, 2.0])
    torch.testing.assert_close(factor.R @ factor.R.T, torch.diag(raised), rtol=1e-5, atol=0)
    assert (factor.floored, factor.first_floored, factor.dead) == (3, 4, 1)
    assert factor.mean_diag == pytest.approx(mean)


def test_couplings_of_a_floored_column_are_dropped(isa):
    """Not semidefinite: column 1 has a zero pivot and yet a coupling; R stays bounded."""
    H = torch.tensor([[1.0, 1e-3, 0.2], [0.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    factor = room.cholesky(H, damp=0.0, floor=1e-7)
    assert (factor.floored, factor.first_floored) == (1, 1)
    expected = torch.tensor([[1.0, 0.0, 0.2], [0.0, 1e-7, 0.0], [0.2, 0.0, 2.0]])
    torch.testing.assert_close(factor.R @ factor.R.T, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("tokens", [1, 40, 200])
def test_undamped_rank_deficiency_stays_bounded(isa, tokens):
    """Without damping most pivots are noise; they must be reported and must not blow up."""
    H = gram(450, tokens)
    factor = room.cholesky(H, damp=0.0)
    U = room.inverse_factor(factor.R)
    assert factor.floored > 0
    assert float(factor.R.abs().max()) <= 1.01 * float(H.diagonal().max()) ** 0.5
    assert bool(U.isfinite().all())


def test_all_columns_dead(isa):
    factor = room.cholesky(torch.zeros(100, 100))
    torch.testing.assert_close(factor.R, 0.1 * torch.eye(100))
    assert (factor.dead, factor.floored, factor.mean_diag) == (100, 0, 0.0)
    assert room.cholesky(torch.zeros(100, 100), damp=0.0).floored == 100


# Diagonal; first and last in processing order; same block, same slice, another slice.
PLACES = [
    (0, 0),
    (399, 399),
    (200, 200),
    (0, 1),
    (0, 399),
    (17, 80),
    (17, 380),
    (5, 398),
    (398, 399),
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_names_the_column(isa, place, value):
    H = gram(400, 900)
    H[place] = value
    for overwrite in (False, True):
        with pytest.raises(
            InputError, match=rf"NaN or Inf in the row or column of input {place[0]};"
        ):
            room.cholesky(H.clone(), overwrite=overwrite)


def test_not_finite_is_found_behind_a_floored_column():
    H = torch.eye(300)
    H[250, 250] = 0
    H[4, 250] = float("nan")
    with pytest.raises(InputError, match="input 4;"):
        room.cholesky(H, damp=0.0)


def test_overflow_is_not_called_nan():
    H = torch.eye(3)
    H[1, 2] = 1e30
    with pytest.raises(
        InputError, match=r"3 x 3\) is too close to singular for damp 0.01.*column 1"
    ):
        room.cholesky(H)


def test_bad_input_is_refused_with_a_sentence():
    H = torch.eye(4)
    cases = [
        (lambda: room.cholesky(torch.zeros(3, 4)), "H must be square but is 3 x 4"),
        (lambda: room.cholesky(torch.zeros(3)), "H must have 2 dimensions"),
        (lambda: room.cholesky(H.double()), "H must be float32 but is float64"),
        (lambda: room.cholesky(torch.eye(8)[::2, ::2], overwrite=True), "not contiguous"),
        (lambda: room.cholesky(H.clone().requires_grad_()), "requires grad"),
        (lambda: room.cholesky(-H), "negative mean diagonal"),
        (lambda: room.inverse_factor(torch.zeros(3, 4)), "R must be square but is 3 x 4"),
        (lambda: room.inverse_factor(torch.eye(3).half()), "R must be float32"),
        (lambda: room.inverse_factor(torch.eye(8)[::2, ::2]), "not contiguous"),
        (lambda: room.inverse_factor(torch.zeros(3, 3)), "R has no inverse"),
        (lambda: room.inverse_factor_(H, torch.eye(3)), "must have the shape of R"),
        (lambda: room.inverse_(H, H), "must not be the same tensor"),
    ]
    for call, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            call()
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="damp must be a finite number >= 0"):
            room.cholesky(H, damp=bad)
    for bad in (0.0, -1e-7, float("nan")):
        with pytest.raises(UsageError, match="floor must be a finite number > 0"):
            room.cholesky(H, floor=bad)


def operands(n: int = 100, device: str = "cpu") -> tuple:
    H = gram(n, 2 * n).to(device)
    return (
        H,
        0.01,
        1e-7,
        torch.zeros(4, dtype=torch.int64, device=device),
        torch.zeros(1, dtype=torch.float64, device=device),
        torch.zeros(room._C.cholesky_work(H), device=device),
    )


def test_raw_op_checks_its_scratch():
    H, damp, floor, info, mean, work = operands()
    for bad, sentence in (
        ((info[:3], mean, work), "info must hold 4 elements but holds 3"),
        ((info.int(), mean, work), "info must be int64"),
        ((info, mean.float(), work), "mean must be float64"),
        ((info, mean, work.double()), "work must be float32"),
    ):
        with pytest.raises(ValueError, match=sentence):
            room.cholesky_(H, damp, floor, *bad)


def test_ops_are_registered_properly():
    torch.library.opcheck(room.cholesky_, operands())
    R = room.cholesky(gram(100, 200)).R
    torch.library.opcheck(room.inverse_factor_, (R, torch.empty_like(R)))
    torch.library.opcheck(room.inverse_, (R, torch.empty_like(R)))


def test_compiles_into_one_graph():
    def invert(H, info, mean, work):
        R = H.clone()
        room.cholesky_(R, 0.01, 1e-7, info, mean, work)
        U = torch.empty_like(R)
        room.inverse_factor_(R, U)
        out = torch.empty_like(R)
        room.inverse_(U, out)
        return out * 2

    H, _, _, *state = operands()
    compiled = torch.compile(invert, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(H, *state), 2 * room.inverse(room.cholesky(H).R))


@pytest.mark.cuda
@pytest.mark.parametrize("n", [*SIZES, 1500])
def test_cuda_meets_the_same_bounds(n):
    H = gram(n, 2 * n + 8)
    here, there = room.cholesky(H), room.cholesky(H.cuda())
    assert there.R.is_cuda and (there.floored, there.first_floored, there.dead) == (0, -1, 0)
    on_cpu = room.Factor(there.R.cpu(), there.damp, 0, -1, there.mean_diag)
    assert torch.equal(on_cpu.R, on_cpu.R.triu())
    assert residual(on_cpu, H) * (n + 3) <= 2 * cuda_steps(n)
    assert there.mean_diag == pytest.approx(here.mean_diag, rel=1e-12)
    U, inverse = room.inverse_factor(there.R).cpu(), room.inverse(there.R).cpu()
    check_inverses(on_cpu.R, U, inverse, cuda_steps(n))


@pytest.mark.cuda
def test_cuda_reports_like_the_cpu():
    for place in PLACES:
        H = gram(400, 900)
        H[place] = float("nan")
        with pytest.raises(InputError, match=rf"input {place[0]};"):
            room.cholesky(H.cuda())
    H = torch.diag(torch.tensor([1.0, -0.5, 3.0, 1e-12, 0.0, 2.0]))
    here, there = room.cholesky(H, damp=0.0), room.cholesky(H.cuda(), damp=0.0)
    torch.testing.assert_close(there.R.cpu(), here.R)
    assert (there.floored, there.first_floored, there.dead) == (3, 4, 1)
    assert room.inverse(room.cholesky(torch.zeros(0, 0).cuda()).R).shape == (0, 0)
    same = [room.cholesky(gram(801, 900).cuda()).R for _ in range(2)]
    assert torch.equal(*same)
