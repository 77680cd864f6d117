"""The refit room on CUDA, simulated: the bounds of test_refit.py with core/gemm.cuh's terms, and
the CPU's results within them."""

import pytest
import test_refit as refits
import test_refit_admm as admms
import torch
from cuda_sim.simulator import altered, early_tiles
from fake_ranks import RanksByTurns, check_admm
from test_obs import problem
from test_refit import DTYPES, hessian, loss, masked

from distaya_ext.ops.refit import admm, refit, refitted


def terms(cols: int) -> float:
    return cols / 16 + 48


@pytest.mark.parametrize("kind", refits.MASKS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (9, 300)], ids=str)
def test_one_step(simulator, shape, kind):
    with simulator.use():
        refits.check_one_step(*shape, kind, terms(shape[1]))


@pytest.mark.parametrize("iterations", [0, 1, 7])
@pytest.mark.parametrize("kind", refits.MASKS)
def test_losses(simulator, kind, iterations):
    with simulator.use():
        refits.check_losses(6, 70, kind, iterations)


@pytest.mark.parametrize("kind", ["half", "mixed"])
def test_optimum(simulator, kind):
    with simulator.use():
        refits.check_optimum(5, 40, kind, damp=0.01)
        refits.check_optimum(4, 40, kind, damp=1e-3, tokens=15)


def test_never_worse(simulator):
    with simulator.use():
        refits.check_monotone(5, 40, 0.01, 0, [1, 2, 3, 4, 6, 9, 20, 60])
        refits.check_monotone(5, 40, 0.0, 20, [1, 2, 3, 4, 6, 9, 20, 60])
        refits.check_from_the_optimum(6, 37, 0.01)


def test_as_on_the_cpu(simulator):
    """Ten iterations: the same gain within 1e-4 of it, whatever order the sums have."""
    T, mask, H = problem(9, 130)[0], masked(9, 130, "half"), hessian(130, 60)
    here = refitted(T, mask, H)
    with simulator.use():
        there = refitted(T, mask, H)
    gain = here.before - here.after
    assert bool(((loss(there.W, T, H) - loss(here.W, T, H)).abs() <= 1e-4 * gain).all())


def test_special_matrices(simulator):
    with simulator.use():
        refits.check_target_and_start(20, 40)
        refits.check_dead_columns()
        refits.check_nan()
        refits.check_dtypes(3, 37)
        admms.check_dead_columns()
        for shape in ((0, 8), (8, 0), (0, 0)):
            W, H = torch.empty(shape), torch.eye(shape[1])
            assert refit(W, torch.ones(shape, dtype=torch.bool), H).shape == shape
            assert admm(W, H, sparsity=0.5)[1].shape == shape


def test_several_runs_of_rows():
    """Rows are taken 2^26 elements at a time; here 90: three runs of three rows, and one row."""
    plain = "kRefitRunCuda = int64_t{1} << 26"
    few = altered("csrc/refit/refit.h", plain, "kRefitRunCuda = 90")
    T, mask, H = problem(10, 30)[0], masked(10, 30, "half"), hessian(30)
    with few.use():
        together = refitted(T, mask, H, iterations=3)
        alone = [refitted(T[i : i + 3], mask[i : i + 3], H, iterations=3) for i in range(0, 10, 3)]
    for i in range(3):
        assert torch.equal(together[i], torch.cat([x[i] for x in alone]))


@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (33, 130)], ids=str)
def test_admm_iteration(simulator, shape):
    with simulator.use():
        admms.check_iteration(*shape, terms(shape[1]))
        admms.check_product(*shape, terms(shape[1]))


@pytest.mark.parametrize("way", admms.WAYS)
def test_admm(simulator, way):
    with simulator.use():
        admms.check_run(10, 40, way, 4)


def test_counts(simulator):
    with simulator.use():
        admms.check_counts()


def test_all_schedules_give_the_same_bits(simulator):
    for W_dtype, T_dtype in zip(DTYPES, (*DTYPES[1:], DTYPES[0]), strict=True):
        W, T = problem(5, 70)[0].to(W_dtype), problem(5, 70, seed=1)[0].to(T_dtype)
        mask, H = masked(5, 70, "mixed"), hessian(70)
        simulator.same_always(
            lambda W=W, T=T, mask=mask, H=H: tuple(refitted(W, mask, H, target=T, iterations=4))
        )
    T, H = admms.weights(6, 40), hessian(40)
    for way in admms.WAYS.values():
        simulator.same_always(lambda way=way: admm(T, H, iterations=3, **way))


def test_admm_of_several_ranks(simulator):
    W, H = problem(40, 64)
    with simulator.use():
        for options in ({"sparsity": 0.5}, {"nm": (2, 4)}):
            check_admm(
                W, H.float(), (13, 0, 27), {**options, "iterations": 3, "levels": 2}, RanksByTurns
            )


def test_rows_sum_as_in_the_whole_product(simulator):
    early = early_tiles()
    W, H = problem(40, 64)
    H, mask = H.float(), masked(40, 64, "half")
    with early.use():
        want = refitted(W, mask, H)
        assert not torch.equal(refitted(W[:20], mask[:20], H).W, want.W[:20])
        for rows in (slice(0, 20), slice(20, 40)):
            got = refitted(W[rows], mask[rows], H, all_rows=40)
            assert all(torch.equal(x, y[rows]) for x, y in zip(got, want, strict=True))
        check_admm(W, H, (13, 0, 27), {"sparsity": 0.5, "iterations": 3, "levels": 2}, RanksByTurns)
