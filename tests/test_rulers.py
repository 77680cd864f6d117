"""The rulers themselves: the textbook route against first principles, the tuned one against it."""

import sys
from pathlib import Path

import pytest
import torch

# Appended, not inserted: an installed distaya_ext must win over the source folder.
sys.path.append(str(Path(__file__).resolve().parent.parent))
from bench import cases, harness, speed, textbook, tuned

MODES = {
    "half": {"sparsity": 0.5},
    "seventy": {"sparsity": 0.7},
    "two_of_four": {"nm": (2, 4)},
    "four_of_eight": {"nm": (4, 8)},
    "int4_row": {"bits": 4},
    "int3_group": {"bits": 3, "group": 32},
    "int4_symmetric": {"bits": 4, "group": 64, "symmetric": True},
    "joint": {"nm": (2, 4), "bits": 4, "group": 128},
    "joint_half": {"sparsity": 0.5, "bits": 4},
}


def problem(rows=48, cols=256, tokens=1024, seed=0, dtype=torch.float64):
    """Correlated inputs with uneven columns; H [cols, cols] = 2/N X^T X."""
    make = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=make, dtype=torch.float64) / cols**0.5
    scale = torch.rand(cols, generator=make, dtype=torch.float64) + 0.2
    X = torch.randn(tokens, cols, generator=make, dtype=torch.float64) @ mix * scale
    W = torch.randn(rows, cols, generator=make, dtype=torch.float64)
    hessian = textbook.Hessian(cols, torch.float64)
    hessian.add(X)
    return W.to(dtype), hessian.H.to(dtype), X


def damped(H, damp=0.01):
    return H + damp * H.diagonal().mean() * torch.eye(H.shape[0], dtype=H.dtype)


def test_running_hessian_is_the_mean_over_sequences():
    X = torch.randn(6, 10, 24, dtype=torch.float64)
    hessian = textbook.Hessian(24, torch.float64)
    for batch in (X[:1], X[1:4], X[4:]):
        hessian.add(batch)
    flat = X.reshape(-1, 24)
    torch.testing.assert_close(hessian.H, 2 / 6 * flat.t() @ flat)


@pytest.mark.parametrize("mode", MODES)
def test_textbook_loss_is_the_layer_error(mode):
    W, H, _ = problem()
    got = textbook.sweep(W, H, dtype=torch.float64, **MODES[mode])
    E = got.W - W
    expected = 0.5 * torch.einsum("rc,cd,rd->r", E, damped(H), E)
    torch.testing.assert_close(got.loss, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("mode", ["half", "two_of_four", "int4_row"])
def test_textbook_sweep_is_optimal_brain_surgery_column_by_column(mode):
    """Without any Cholesky: at each column, the explicit inverse of what is still free."""
    W, H, _ = problem(rows=6, cols=40, tokens=200)
    got = textbook.sweep(W, H, dtype=torch.float64, **MODES[mode])
    free = W.clone()
    for j in range(40):
        inverse = torch.linalg.inv(damped(H)[j:, j:])
        e = (free[:, j] - got.W[:, j]) / inverse[0, 0]
        free[:, j:] -= e[:, None] * inverse[0]
        # a kept weight of a pruning sweep must be exactly where the compensation put it
        if mode != "int4_row":
            assert torch.equal(got.W[:, j] == 0, ~got.mask[:, j])
    torch.testing.assert_close(free, got.W, rtol=1e-8, atol=1e-9)


def test_published_count_is_one_more_than_asked_per_block():
    W, H, _ = problem(rows=10, cols=300)
    mask = textbook.sweep(W, H, sparsity=0.3, dtype=torch.float64).mask
    dropped = [int((~part).sum()) for part in mask.split(128, dim=1)]
    assert dropped == [385, 385, 133]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mode", MODES)
def test_tuned_equals_textbook(mode, dtype):
    W, H, _ = problem(dtype=dtype)
    slow = textbook.sweep(W, H, dtype=dtype, stale=False, **MODES[mode])
    fast = tuned.sweep(W, H, **MODES[mode])
    tight = {"rtol": 1e-8, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-3, "atol": 2e-3}
    assert torch.equal(slow.mask, fast.mask)
    if slow.codes is not None:
        assert torch.equal(slow.codes, fast.codes)
        torch.testing.assert_close(fast.scales, slow.scales, **tight)
        assert torch.equal(fast.zeros, slow.zeros)
    torch.testing.assert_close(fast.W, slow.W, **tight)
    torch.testing.assert_close(fast.loss, slow.loss, rtol=tight["rtol"], atol=0)


@pytest.mark.parametrize(("rows", "cols"), [(1, 128), (7, 200), (33, 128), (5, 36)])
@pytest.mark.parametrize("mode", ["half", "two_of_four", "int4_row"])
def test_tuned_equals_textbook_on_odd_shapes(mode, rows, cols):
    W, H, _ = problem(rows, cols, seed=3)
    slow = textbook.sweep(W, H, dtype=torch.float64, **MODES[mode])
    fast = tuned.sweep(W, H, **MODES[mode])
    assert torch.equal(slow.mask, fast.mask)
    torch.testing.assert_close(fast.W, slow.W, rtol=1e-8, atol=1e-9)


def test_dead_columns_and_ties_keep_exactly_two_of_four():
    W, _, X = problem(rows=9, cols=64)
    X = X.clone()
    X[:, [3, 8, 9, 10, 11]] = 0  # the second group is dead as a whole: four equal scores
    hessian = textbook.Hessian(64, torch.float64)
    hessian.add(X)
    for got in (
        textbook.sweep(W, hessian.H, nm=(2, 4), dtype=torch.float64),
        tuned.sweep(W, hessian.H, nm=(2, 4)),
    ):
        assert torch.equal(got.mask.reshape(9, 16, 4).sum(2), torch.full((9, 16), 2))
        assert (got.W[:, [3, 8, 9, 10, 11]] == 0).all()
        assert not got.mask[:, 3].any()


@pytest.mark.parametrize("static", [False, True])
def test_activation_order_comes_back_in_original_columns(static):
    W, H, _ = problem(rows=12)
    got = textbook.gptq(W, H, 4, group=64, order="activation", static=static, dtype=torch.float64)
    assert torch.equal(got.perm, torch.argsort(H.diagonal(), descending=True))
    place = torch.empty(256, dtype=torch.int64)
    place[got.perm] = torch.arange(256)
    group = (torch.arange(256) if static else place) // 64
    rebuilt = got.scales[:, group] * (got.codes - got.zeros[:, group])
    torch.testing.assert_close(rebuilt, got.W, rtol=0, atol=0)
    E = got.W - W
    expected = 0.5 * torch.einsum("rc,cd,rd->r", E, damped(H), E)
    torch.testing.assert_close(got.loss, expected, rtol=1e-9, atol=0)


def test_given_mask_is_obeyed_and_compensated():
    W, H, _ = problem()
    mask = textbook.magnitude(W, 0.5)
    got = textbook.sweep(W, H, mask=mask, dtype=torch.float64)
    assert torch.equal(got.mask, mask)
    E = torch.where(mask, 0.0, -W)
    plain = 0.5 * torch.einsum("rc,cd,rd->r", E, damped(H), E)
    assert (got.loss < plain).all()


def test_stale_group_grids_differ_only_below_the_block_size():
    W, H, _ = problem()
    run = {
        (group, stale): textbook.gptq(W, H, 4, group=group, stale=stale, dtype=torch.float64)
        for group in (64, 128)
        for stale in (True, False)
    }
    torch.testing.assert_close(run[128, True].scales, run[128, False].scales)
    assert not torch.equal(run[64, True].scales, run[64, False].scales)


def test_wanda_and_magnitude_counts_and_order_of_quality():
    W, H, X = problem(rows=20, cols=256)
    norms = X.square().sum(0).sqrt()
    by_row = textbook.wanda(W, norms, 0.5)
    assert (by_row.sum(1) == 128).all()
    assert int((~textbook.magnitude(W, 0.5)).sum()) == 20 * 128 + 1
    nm = textbook.wanda(W, norms, nm=(2, 4))
    assert (nm.reshape(20, 64, 4).sum(2) == 2).all()

    def error(Q):
        E = Q - W
        return float(torch.einsum("rc,cd,rd->", E, H, E))

    swept = error(textbook.sweep(W, H, sparsity=0.5, dtype=torch.float64).W)
    assert swept < error(W * by_row) < error(W * textbook.magnitude(W, 0.5))


@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_stays_within_a_step_and_zero_is_exact(symmetric):
    W = torch.randn(8, 96)
    W[:, 5] = 0
    got = textbook.rtn(W, 4, group=32, symmetric=symmetric)
    step = got.scales.repeat_interleave(32, dim=1)
    inside = torch.ones_like(W, dtype=torch.bool) if not symmetric else got.codes < 15
    # half a step, plus half a step at the ends where the zero point itself was rounded
    assert ((got.W - W).abs()[inside] <= step[inside] * 1.001).all()
    assert (got.W[:, 5] == 0).all()
    assert (
        textbook.rtn(W, 4, mse=True).W.sub(W).abs().pow(2.4).sum()
        <= textbook.rtn(W, 4).W.sub(W).abs().pow(2.4).sum()
    )


def test_tuned_hessian_is_the_upper_triangle():
    X = torch.randn(50, 700)
    H = torch.zeros(700, 700)
    tuned.hessian_(H, X, panel=256)
    torch.testing.assert_close(H.triu(), (X.t() @ X).triu(), rtol=1e-4, atol=1e-4)


def test_a_run_that_waited_for_a_core_is_flagged():
    quiet = harness.Sample(wall=1.0, cpu=0.98, queue=0.01, threads=1)
    assert not quiet.contended
    assert harness.Sample(wall=1.3, cpu=1.0, queue=None, threads=1).contended
    assert harness.Sample(wall=1.0, cpu=1.9, queue=0.3, threads=2).contended
    serial = harness.Sample(wall=1.0, cpu=1.1, queue=0.02, threads=2)
    assert not serial.contended
    got = harness.summary([quiet, harness.Sample(9.0, 1.0, 8.0, 1), quiet])
    assert (got.wall, got.runs, got.contended, got.trusted) == (1.0, 3, 1, True)
    assert not harness.summary([harness.Sample(9.0, 1.0, 8.0, 1)]).trusted


def test_compare_alternates_and_prepares_outside_the_clock():
    seen = []
    slow = harness.Contender("a", lambda x: seen.append(x), lambda: ("a",), runs=2)
    once = harness.Contender("b", lambda x: seen.append(x), lambda: ("b",), runs=1)
    before = torch.get_num_threads()
    got = harness.compare([slow, once], before, warm=False, extra=0)
    assert seen == ["a", "b", "a"]
    assert got["a"].runs == 2 and got["b"].runs == 1


def test_table_writer_replaces_only_its_own_part(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("top\n<!-- bench:x -->\nold\n<!-- /bench:x -->\nend\n")
    harness.write_table(path, "x", "| new |")
    assert path.read_text() == "top\n<!-- bench:x -->\n| new |\n<!-- /bench:x -->\nend\n"
    with pytest.raises(ValueError, match="exactly one <!-- bench:y -->"):
        harness.write_table(path, "y", "| new |")


@pytest.mark.parametrize("name", [n for n in cases.cases(True, False) if "Hessian" not in n])
def test_speed_rows_time_the_same_problem(name):
    """Both rulers of a row must end with the same loss (sweeps) or the same factor."""
    case = cases.cases(quick=True, ours=False)[name]()
    got = {c.name: c.run(*c.prepare()) for c in case.contenders}
    slow, fast = got["textbook"], got["tuned"]
    if isinstance(slow, torch.Tensor):  # U against R = U^-1
        eye = torch.eye(slow.shape[0])
        torch.testing.assert_close(slow @ fast, eye, rtol=0, atol=5e-3)
        return
    if not isinstance(slow, float):
        slow, fast = (float(result.loss.double().sum()) for result in (slow, fast))
    assert fast == pytest.approx(slow, rel=2e-3)
    assert case.fp32 > 0


def timing(wall, threads=1, contended=0):
    return harness.Timing(wall, wall, 3, contended, threads)


def test_speed_table_and_verdict():
    def row(threads, ours, contended=0):
        times = (timing(6.0, threads), timing(2.5, threads), timing(ours, threads, contended))
        return speed.Row("sweep", threads, False, *times, 160.0, 240.0, (6.0, 2.5), "")

    text = speed.table([row(1, 1.0), row(2, 0.5)])
    one, two = (line for line in text.splitlines() if line.startswith("| sweep"))
    assert one == "| sweep | 6.00 s | 2.50 s | 1.00 s | 6.0 | 2.5 | 160 | 240 |"
    assert two.endswith("| 500 ms | 12.0 | 5.0 | 320 | 240 | 2.00 |")
    assert "bars met" in speed.tell(row(1, 1.0))
    assert "BELOW 6x and 2.5x" in speed.tell(row(1, 1.25))
    spoilt = row(1, 1.0, contended=3)
    assert not spoilt.trusted and "CONTENDED" in speed.tell(spoilt)
    assert "sweep (contended)" in speed.table([spoilt])
