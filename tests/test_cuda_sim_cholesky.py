"""The cholesky room on CUDA, simulated: bounds of test_cholesky.py, reports as on the CPU."""

import pytest
import torch
from cuda_sim import build, simulator
from test_cholesky import check_inverses, cuda_steps, damped, gram, layer_norm_gram, residual

from distaya_ext.errors import InputError
from distaya_ext.ops import cholesky as room

# Squares of 32, blocks of 128, slices of 256, and their neighbours.
SIZES = [1, 2, 31, 63, 64, 65, 127, 128, 129, 200, 257, 300]


def check_factor(simulator, H: torch.Tensor, damp: float = 0.01) -> room.Factor:
    with simulator.use():
        factor = room.cholesky(H, damp)
    assert torch.equal(factor.R, factor.R.triu())
    assert bool((factor.R.diagonal() > 0).all())
    assert (factor.floored, factor.first_floored) == (0, -1)
    assert residual(factor, H) * (len(H) + 3) <= 2 * cuda_steps(len(H))
    return factor


@pytest.mark.parametrize("n", SIZES)
def test_factor_and_inverses_meet_their_bounds(simulator, n):
    H = gram(n, 2 * n + 8)
    factor, on_cpu = check_factor(simulator, H), room.cholesky(H)
    assert (factor.mean_diag, factor.dead) == (pytest.approx(on_cpu.mean_diag, rel=1e-12), 0)
    torch.testing.assert_close(factor.R, on_cpu.R, rtol=0, atol=1e-5)
    with simulator.use():
        U, inverse = room.inverse_factor(factor.R), room.inverse(factor.R)
    check_inverses(factor.R, U, inverse, cuda_steps(n))


def test_a_slice_that_is_finished_beside_the_next(simulator):
    """From 513 columns on: thread blocks also have tiles over the panels of the slice before."""
    check_factor(simulator, gram(577, 1300))


def test_products_that_meet_tiny_and_large_columns(simulator):
    """The same bounds where columns differ by six orders of magnitude, undamped."""
    scale = torch.logspace(3, -3, 270)
    H = gram(270, 700) * scale[:, None] * scale
    with simulator.use():
        factor = room.cholesky(H, damp=0.0, floor=1e-30)
    assert factor.floored == 0
    assert residual(factor, H) <= 2


@pytest.mark.parametrize("damp", [0.01, 1e-5])
def test_singular_hessians_need_no_floor_when_damped(simulator, damp):
    few_tokens, norm = gram(270, 60), layer_norm_gram(270)
    dead = norm.clone()
    dead[[0, 3, 250, 269]] = 0
    dead[:, [0, 3, 250, 269]] = 0
    for H, zeros in ((few_tokens, 0), (norm, 0), (dead, 4)):
        assert check_factor(simulator, H, damp).dead == zeros


def test_large_tiles_in_the_trailing_update():
    """The kernel that n of 2000 and more takes, made to start at once."""
    path = "csrc/cholesky/cholesky_cuda.cu"
    text = (build.ROOT / path).read_text()
    plain = "large_pays(1 + s.tiles(LargeTile::kRows), 1 + s.tiles(SmallTile::kRows))"
    assert text.count(plain) == 1
    replaced = {path: text.replace(plain, "(s.k > 0)")}
    large = simulator.Simulator(build.build(replaced))
    H = gram(600, 1300)
    check_factor(large, H)
    large.same_always(lambda: room.cholesky(H[:270, :270].contiguous()).R)


def test_all_schedules_give_the_same_bits(simulator):
    R = simulator.same_always(lambda: room.cholesky(gram(270, 600)).R)
    R = R[-140:, -140:].contiguous()
    simulator.same_always(lambda: (room.inverse_factor(R), room.inverse(R)))


def test_only_the_upper_triangle_is_read(simulator):
    H = gram(260, 700)
    lower = torch.ones(260, 260).tril(-1).bool()
    with simulator.use():
        expected = room.cholesky(H).R
        U, inverse = room.inverse_factor(expected), room.inverse(expected)
        H[lower] = float("nan")
        R = room.cholesky(H).R
        assert torch.equal(R, expected)
        R[lower] = 7.0
        assert torch.equal(room.inverse_factor(R), U)
        assert torch.equal(room.inverse(R), inverse)


def test_floored_pivots_are_raised_and_counted(simulator):
    diagonal = torch.tensor([1.0, -0.5, 3.0, 1e-12, 0.0, 2.0])
    H = torch.block_diag(torch.diag(diagonal), torch.eye(250), torch.diag(diagonal))
    here = room.cholesky(H, damp=0.0, floor=1e-6)
    with simulator.use():
        there = room.cholesky(H, damp=0.0, floor=1e-6)
    torch.testing.assert_close(there.R, here.R, rtol=1e-6, atol=0)
    assert (there.floored, there.first_floored, there.dead) == (6, 260, 2)
    assert (here.floored, here.first_floored, here.dead) == (6, 260, 2)


def test_a_pivot_at_the_floor_stays(simulator):
    """Below it is what counts; and where all numbers are large, nothing beyond H's edge does."""
    at_floor = torch.diag(torch.tensor([1.5, 0.5, 1.5, 0.5]))
    at_floor[0, 1] = 0.25
    large = 1e9 * torch.eye(130)
    for H, floor in ((at_floor, 0.5), (large, 1e-6)):
        here = room.cholesky(H, damp=0.0, floor=floor)
        with simulator.use():
            there = room.cholesky(H, damp=0.0, floor=floor)
        assert (here.floored, there.floored) == (0, 0)
        torch.testing.assert_close(there.R, here.R, rtol=1e-6, atol=0)


def test_where_the_mean_is_of_no_use(simulator):
    """Nothing on the diagonal, or so little that the floor underflows."""
    for H, damp in ((torch.zeros(5, 5), 0.01), (torch.diag(torch.tensor([1e-37, 0.0])), 0.0)):
        here = room.cholesky(H, damp)
        with simulator.use():
            there = room.cholesky(H, damp)
            U = room.inverse_factor(there.R)
        assert there.floored == here.floored and bool(U.isfinite().all())
        torch.testing.assert_close(there.R, here.R, rtol=1e-6, atol=0)


@pytest.mark.parametrize("column", [1, 40, 150])
def test_couplings_of_a_floored_column_are_dropped(simulator, column):
    """A zero pivot and yet a coupling, within a square, a block and across blocks."""
    H = torch.eye(160) + 0.2 * torch.diag(torch.ones(155), 5)
    H[column, column:] = 0
    H[0, column] = 1e-3
    with simulator.use():
        factor = room.cholesky(H, damp=0.0, floor=1e-7)
    assert (factor.floored, factor.first_floored) == (1, column)
    expected = damped(H, 0.0)
    expected[column] = expected[:, column] = 0
    expected[column, column] = factor.R[column, column].double() ** 2
    R = factor.R.double()
    torch.testing.assert_close(R @ R.T, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 40, 150])
def test_undamped_rank_deficiency_stays_bounded(simulator, tokens):
    """Most pivots are noise then; no more of them are floored than in plain fp32, but for 2 %."""
    H = gram(270, tokens)
    here = room.cholesky(H, damp=0.0)
    with simulator.use():
        there = room.cholesky(H, damp=0.0)
        U = room.inverse_factor(there.R)
    assert there.floored > 0
    assert there.floored <= 1.02 * here.floored
    assert float(there.R.abs().max()) <= 1.01 * float(H.diagonal().max()) ** 0.5
    assert bool(U.isfinite().all())


def test_all_columns_dead(simulator):
    with simulator.use():
        factor = room.cholesky(torch.zeros(140, 140))
        undamped = room.cholesky(torch.zeros(140, 140), damp=0.0)
    torch.testing.assert_close(factor.R, 0.1 * torch.eye(140))
    assert (factor.dead, factor.floored, factor.mean_diag) == (140, 0, 0.0)
    assert (undamped.floored, undamped.first_floored) == (140, 139)


# Diagonal: first, last, middle; within a square, a block, a slice; across slices.
PLACES = [(0, 0), (269, 269), (150, 150), (3, 20), (17, 80), (140, 200), (17, 180), (5, 268)]


def test_not_finite_names_the_column(simulator):
    for i, place in enumerate(PLACES):
        H = gram(270, 600)
        H[place] = (float("nan"), float("inf"), float("-inf"))[i % 3]
        with simulator.use(), pytest.raises(InputError, match=rf"of input {place[0]};"):
            room.cholesky(H)


def test_not_finite_is_found_behind_a_floored_column(simulator):
    H = torch.eye(270)
    H[250, 250] = 0
    H[4, 250] = float("nan")
    with simulator.use(), pytest.raises(InputError, match="input 4;"):
        room.cholesky(H, damp=0.0)


def test_overflow_is_not_called_nan(simulator):
    H = torch.eye(140)
    H[1, 139] = 1e30
    with simulator.use(), pytest.raises(InputError, match=r"too close to singular.*column 1"):
        room.cholesky(H)


def test_nothing_and_one(simulator):
    with simulator.use():
        empty = room.cholesky(torch.zeros(0, 0))
        assert (empty.R.shape, empty.floored, empty.mean_diag) == ((0, 0), 0, 0.0)
        assert room.inverse(empty.R).shape == (0, 0)
        one = room.cholesky(torch.tensor([[4.0]]), damp=0.0)
        assert (one.R.item(), one.mean_diag) == (2, 4)
        assert room.inverse_factor(one.R).item() == 0.5
        assert room.inverse(one.R).item() == 0.25
