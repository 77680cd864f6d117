"""The CUDA sweep, run by the simulator, against the float64 textbook and the CPU twin.

The same judgements as in test_obs.py: decisions must equal the textbook's wherever they are clear,
weights must obey the sweep's rule within its rounding. 70 rows are three warps in two thread
blocks, 300 columns are three blocks of the sweep, the last one ragged.
"""

import pytest
import torch
from cuda_sim.simulator import altered, early_tiles
from fake_ranks import RanksByTurns, check_sweep
from test_obs import (
    MODES,
    check_count,
    check_degenerate,
    check_given_mask,
    check_narrow,
    check_rounding,
    check_skewed,
    check_textbook,
    check_ties,
    damped,
    factor,
    problem,
)

from distaya_ext.ops import obs as room
from distaya_ext.ops.cholesky import solve_
from distaya_ext.ops.obs import Quant, sweep_
from distaya_ext.ops.order import permutation

SCHEDULES = ("forward", "reverse", "random", "greedy", "greedy-reverse")


def cases() -> list:
    """Every mode at a small shape; at the larger ones those that a single threshold does not make
    hang by some of ten thousand decisions."""
    out = []
    for mode, options in MODES.items():
        couples = "sparsity" in options and "quant" in options
        for rows, cols in [(5, 129), (1, 300)] if couples else [(5, 129), (33, 260)]:
            out.append(pytest.param((rows, cols), mode, id=f"{rows}x{cols}-{mode}"))
    return out


@pytest.mark.parametrize(("shape", "mode"), cases())
def test_textbook(simulator, shape, mode):
    with simulator.use():
        check_textbook(shape, mode)


@pytest.mark.parametrize("mode", ["half", "2:4 int4", "int4 row"])
@pytest.mark.parametrize("shape", [(1, 96), (70, 300)])
def test_one_row_and_several_blocks(simulator, shape, mode):
    with simulator.use():
        check_textbook(shape, mode)


def test_panels_that_do_not_fit_at_once(simulator):
    """64 MB of panels are all of them up to 4096 columns; here they hold two of three or four."""
    plain = "(int64_t{1} << 24) / (cols * kB)"
    few = altered("csrc/obs/obs_cuda.cu", plain, "2 + 0 * cols")
    for mode in ("half", "2:3", "2:4 int4"):
        W0, H = problem(5, 400)
        R, results = factor(damped(H)), []
        for kernels in (simulator, few):
            with kernels.use():
                W = W0.clone()
                results.append((W, *sweep_(W, R, **MODES[mode])))
        assert all(x is y or torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("sparsity", [0.0, 1e-9, 0.31, 0.999])
def test_exact_count(simulator, sparsity):
    with simulator.use():
        for shape in [(1, 7), (3, 129), (34, 140)]:
            check_count(shape, sparsity)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(50, 20), (3, 128), (1103, 3), (2100, 3)])
def test_ties_go_in_row_major_order(simulator, rows, cols, reference):
    """From 1025 rows on runs of rows are counted: the last tie is in the 2nd of 2, the 3rd of 3."""
    with simulator.use():
        check_ties(rows, cols, reference)


@pytest.mark.parametrize("mode", ["half", "published 50%", "half int4 g64", "2:4"])
def test_rows_on_several_ranks(simulator, mode):
    W, H = problem(40, 140)
    R = factor(damped(H))
    with simulator.use():
        for rows in [(20, 20), (0, 33, 1, 6)]:
            ranks = check_sweep(W, R, rows, MODES[mode], RanksByTurns)
            assert ranks.sizes == [[2048, 1024, 1024] * 2 * ("sparsity" in MODES[mode])] * len(rows)


@pytest.mark.parametrize("kind", ["zeros", "few", "rows"])
@pytest.mark.parametrize("reference", [False, True])
def test_ties_of_several_ranks(simulator, kind, reference):
    """Ties end in any of the ranks; 1030 rows are runs of two."""
    W = torch.randint(-1, 2, (40, 20), generator=torch.Generator().manual_seed(2)).float()
    W = {"zeros": W * 0, "few": W, "rows": W[:, :1].expand(40, 20).contiguous()}[kind]
    with simulator.use():
        for sparsity in (0.1, 0.5, 0.8):
            options = {"sparsity": sparsity, "reference": reference}
            check_sweep(W, torch.eye(20), (13, 0, 26, 1), options, RanksByTurns)
        tall = torch.ones(1060, 3)
        options = {"sparsity": 0.7, "reference": reference}
        check_sweep(tall, torch.eye(3), (30, 1030), options, RanksByTurns)


def test_ranks_under_every_schedule(simulator):
    W, H = problem(20, 30)
    R = factor(damped(H))

    def sweep():
        ranks = RanksByTurns((7, 13))
        parts = ranks.results(
            lambda r, among: sweep_(ranks.own(r, W).clone(), R, sparsity=0.5, among=among)
        )
        return [t for part in parts for t in part]

    simulator.same_always(sweep)


def test_rows_sum_as_in_the_whole_product(simulator):
    """The tile of a product, and with it the order of its sums, follows from all rows."""
    early = early_tiles()
    W, H = problem(40, 300)
    R = factor(damped(H))
    with early.use():
        whole, part = W.clone(), W[:20].clone()
        sweep_(whole, R, nm=(2, 4))
        sweep_(part, R, nm=(2, 4))
        assert not torch.equal(whole[:20], part)  # the two tiles do differ
        check_sweep(W, R, (20, 20), {"nm": (2, 4)}, RanksByTurns)
        check_sweep(W, R, (20, 20), {"sparsity": 0.5}, RanksByTurns)
        X = W.clone()
        solve_(X, R)
        for rows, want in zip(W.split(20), X.split(20), strict=True):
            found = rows.clone()
            solve_(found, R, 40)
            assert torch.equal(found, want)


def test_nm_ties_lower_index_goes(simulator):
    for m, n in [(4, 1), (7, 3), (20, 9)]:
        with simulator.use():
            got = sweep_(torch.ones(5, 47), torch.eye(47), nm=(n, m))
        kept = torch.arange(47) % m >= m - n
        left = 47 % m  # columns of the last group: its first left - n go
        kept[47 - left :] = torch.arange(left) >= left - n
        assert torch.equal(got.mask, kept.expand(5, 47))


@pytest.mark.parametrize("heavy", [0.0, 0.9])
def test_threshold_with_skewed_scores(simulator, heavy):
    with simulator.use():
        check_skewed(heavy)


def test_given_mask(simulator):
    with simulator.use():
        check_given_mask(33, 260)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["half", "2:4 int4"])
def test_narrow_weights_are_the_float_result_rounded(simulator, dtype, mode):
    with simulator.use():
        check_narrow(3, 140, dtype, mode)


@pytest.mark.parametrize("quant", [m["quant"] for n, m in MODES.items() if n.startswith("int")])
def test_round_to_nearest(simulator, quant):
    with simulator.use():
        check_rounding(quant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 8])
def test_grids_equal_the_cpu_twins(simulator, dtype, bits):
    """Ranges, scales and codes are the same operations in the same order on both sides."""
    W = torch.randn(9, 100, generator=torch.Generator().manual_seed(5))
    W[0] = 0
    W[1] *= 1e-30
    W[2] *= 1e30 if dtype != torch.float16 else 1e4
    for scale_dtype in (torch.float32, torch.bfloat16, torch.float16):
        for symmetric in (False, True):
            quant = Quant(bits, 32, symmetric=symmetric, scale_dtype=scale_dtype)
            want = room.quantize(W.to(dtype), quant)
            with simulator.use():
                got = room.quantize(W.to(dtype), quant)
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", ["few tokens", "dead columns", "layernorm"])
def test_degenerate_hessians(simulator, kind):
    with simulator.use():
        check_degenerate(kind, "2:4 int4")


def raw(W0, R, group, *, nm=(0, 0), grids=None, group_of=None, reference=False, mse=False):
    """The sweep through its raw operator, which takes groups of any width: W, mask, codes, ..."""
    rows, cols = W0.shape
    W, codes, mask = W0.clone(), torch.empty(rows, cols, dtype=torch.uint8), None
    if nm[1]:
        mask = torch.empty(rows, cols, dtype=torch.bool)
    scales, zeros = grids or (torch.empty(rows, -(-cols // group)) for _ in range(2))
    loss = torch.zeros(rows, dtype=torch.float64)
    room.obs_(W, R, mask, codes, scales, zeros, group_of, loss, "nm" if nm[1] else "none", 0.0,
              reference, *nm, 4, group, False, mse, "float32", grids is None)  # fmt: skip
    return W, mask, codes, scales, zeros, loss


def agree(got, want, share: float) -> None:
    """Rows with the same decisions agree throughout, and they are at least that share of all."""
    same = (got[2] == want[2]).all(1)
    if got[1] is not None:
        same &= (got[1] == want[1]).all(1)
    assert same.double().mean() >= share
    for x, y in zip(got, want, strict=True):
        if x is not None:
            torch.testing.assert_close(x[same].float(), y[same].float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("group", "nm", "reference", "mse"),
    [(48, (0, 0), False, False), (100, (0, 0), True, False), (5, (0, 0), False, True),
     (42, (3, 7), False, False), (33, (4, 11), True, False), (17, (9, 17), False, False),
     (128, (10, 32), False, False), (120, (2, 3), False, True)],
)  # fmt: skip
def test_groups_of_any_width(simulator, group, nm, reference, mse):
    """Groups that begin and end inside the sweep's tiles of 16 columns."""
    W0, H = problem(33, 150)
    R = factor(damped(H))
    want = raw(W0, R, group, nm=nm, reference=reference, mse=mse)
    with simulator.use():
        got = raw(W0, R, group, nm=nm, reference=reference, mse=mse)
    agree(got, want, 0.6)  # the others hang by a rounding somewhere in 270 columns


def test_group_of(simulator):
    """Columns that name their group read the same grids as columns that have one each."""
    W0, H = problem(33, 200)
    R = factor(damped(H))
    grids = room.grids(W0, Quant(4, 32, static=True))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    group_of = torch.arange(200)[order] // 32
    each = tuple(x[:, group_of].contiguous() for x in grids)
    with simulator.use():
        got = raw(W0, R, 32, nm=(2, 4), grids=grids, group_of=group_of)
        alone = raw(W0, R, 1, nm=(2, 4), grids=each)
    for i in (0, 1, 2, 5):
        assert torch.equal(got[i], alone[i])
    agree(got, raw(W0, R, 32, nm=(2, 4), grids=grids, group_of=group_of), 0.6)


@pytest.mark.parametrize("mode", ["half", "published 50%", "2:3 int4 g32", "int2 g64 mse"])
def test_same_bits_in_every_schedule(simulator, mode):
    W0, H = problem(33, 132)
    R, results = factor(damped(H)), []
    for name in SCHEDULES:
        with simulator.use(), simulator.schedule(name):
            W = W0.clone()
            results.append((W, *sweep_(W, R, **MODES[mode])))
    for other in results[1:]:
        assert all(x is y or torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_ties_in_every_schedule(simulator):
    for name in SCHEDULES:
        with simulator.use(), simulator.schedule(name):
            check_ties(1103, 3, reference=False)
            check_ties(40, 100, reference=False)


def test_empty(simulator):
    with simulator.use():
        for rows, cols in ((0, 8), (4, 0), (0, 0)):
            got = sweep_(torch.zeros(rows, cols), torch.eye(cols), nm=(2, 4), quant=Quant(4, 32))
            assert got.mask.shape == got.codes.shape == (rows, cols)


@pytest.mark.parametrize("order", ["group", "block"])
def test_orders_by_expected_loss(simulator, order):
    """The CPU's order, the same under every schedule, and the sweep that follows it."""
    W, H = problem(6, 260, seed=4)
    H = H.float()
    pattern = {"nm": (2, 4)} if order == "group" else {"sparsity": 0.5}
    perm = permutation(order, W, H, (2, 4), 0.5)
    assert torch.equal(simulator.same_always(lambda: permutation(order, W, H, (2, 4), 0.5)), perm)
    with simulator.use():
        got = room.obs(W, H, order=order, **pattern)
    want = room.reference(W[:, perm], damped(H.double())[perm][:, perm], **pattern)
    assert torch.equal(got.perm, perm) and want.clear.any()
    assert torch.equal(got.mask[:, perm][want.clear], want.mask[want.clear])
