"""The OBS sweep against the float64 textbook, and against what its result must satisfy by itself.

Decisions (masks, codes) must equal the textbook's exactly in every row where none of them hangs by
a relative 1e-5. Weights are judged by the rule they must obey (``check_weights``), with a bound
derived from the rounding of one block, not by a tolerance on the result.
"""

import functools

import pytest
import torch

from distaya_ext.ops import obs as room
from distaya_ext.ops.obs import Quant, sweep_

U32 = 2.0**-24  # unit roundoff of float32
SHAPES = [(1, 1), (1, 300), (3, 129), (17, 100), (49, 384), (100, 256)]
MODES = {
    "half": {"sparsity": 0.5},
    "70%": {"sparsity": 0.7},
    "published 50%": {"sparsity": 0.5, "reference": True},
    "2:4": {"nm": (2, 4)},
    "4:8": {"nm": (4, 8)},
    "1:16": {"nm": (1, 16)},
    "5:32": {"nm": (5, 32)},
    "2:3": {"nm": (2, 3)},
    "int4 row": {"quant": Quant(4, 0)},
    "int4 g128": {"quant": Quant(4, 128)},
    "int3 g32 symmetric": {"quant": Quant(3, 32, symmetric=True)},
    "int2 g64 mse": {"quant": Quant(2, 64, scale="mse")},
    "int8 g64 bf16": {"quant": Quant(8, 64, scale_dtype=torch.bfloat16)},
    "int4 g32 static f16": {"quant": Quant(4, 32, static=True, scale_dtype=torch.float16)},
    "int4 g32 published": {"quant": Quant(4, 32), "reference": True},
    "2:4 int4": {"nm": (2, 4), "quant": Quant(4, 128)},
    "2:3 int4 g32": {"nm": (2, 3), "quant": Quant(4, 32)},
    "half int4 row": {"sparsity": 0.5, "quant": Quant(4, 0)},
    "half int4 g64": {"sparsity": 0.5, "quant": Quant(4, 64)},
}


def problem(rows: int, cols: int, seed: int = 0, tokens: int = 0):
    """W float32 [rows, cols] with a few large columns, H float64 from correlated inputs."""
    make = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens or 2 * cols + 8, cols, generator=make, dtype=torch.float64)
    mix = torch.randn(cols, cols, generator=make, dtype=torch.float64) / max(cols, 1) ** 0.5
    X = X @ (torch.eye(cols, dtype=torch.float64) + 0.5 * mix)
    X *= torch.logspace(0, -1, cols, dtype=torch.float64)
    W = torch.randn(rows, cols, generator=make)
    return W, X.T @ X / len(X)


def damped(H: torch.Tensor, damp: float = 0.01) -> torch.Tensor:
    return H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def factor(H: torch.Tensor) -> torch.Tensor:
    """R upper, float32, H = R R^T, by torch: this file does not lean on the cholesky room."""
    return torch.linalg.cholesky(H.double().flip(0, 1)).flip(0, 1).float().contiguous()


@functools.cache
def separated(rows: int, cols: int, mode: str) -> tuple[int, room.Reference]:
    """The first seed whose decisions are clear (in all rows where one threshold couples them)."""
    options = MODES[mode]
    symmetric = "quant" in options and options["quant"].symmetric
    # A symmetric grid puts the extreme weight of a group on a tie by construction: x.5 steps.
    wanted = 1.0 if "sparsity" in options else 0.1 if symmetric else 0.6
    for seed in range(30):
        W, H = problem(rows, cols, seed)
        want = room.reference(W, damped(H), **options)
        if want.clear.double().mean() >= wanted:
            return seed, want
    raise AssertionError(f"no seed separates the decisions of {mode} at {rows} x {cols}")


def check_weights(W0, Q, R, keep, cols_per_block: int = 128) -> None:
    """Kept, unrounded weights must be the entry weights of their own sweep.

    In exact arithmetic (E M)_j = 0 wherever weight j was kept. Computed in fp32, T = W0 + E P with
    P = R U_b, then g N inside the block, each a sum of at most n terms, n = columns so far:
    |e| <= 3 n u (|W0| + |E| |R| |U_b| + |g| |N_b|) per entry (sum, P and the stored Q). An error e
    of one column reaches the later ones of its block through M_bb: |(E M)_j| <= (|e| |M_bb|)_j.
    """
    E, R = W0.double() - Q.double(), R.double()
    M = R / R.diagonal()
    G = E @ M
    for i1 in range(0, W0.shape[1], cols_per_block):
        b = slice(i1, min(i1 + cols_per_block, W0.shape[1]))
        U = torch.linalg.inv(R[b, b])
        N = R.diagonal()[b, None] * U
        size = W0[:, b].double().abs() + G[:, b].abs() @ N.abs()
        size += E[:, :i1].abs() @ R[:i1, b].abs() @ U.abs()
        bound = 3 * b.stop * U32 * size @ M[b, b].abs()
        excess = torch.where(keep[:, b], G[:, b].abs() - bound, -1.0)
        assert excess.max() <= 0


def cases() -> list:
    """Every mode at every shape, but one threshold and roundings together only where a seed exists
    that leaves none of some ten thousand decisions hanging."""
    return [
        pytest.param(shape, mode, id=f"{shape[0]}x{shape[1]}-{mode}")
        for shape in SHAPES
        for mode, options in MODES.items()
        if not ("sparsity" in options and "quant" in options and shape[0] * shape[1] > 2000)
    ]


@pytest.mark.parametrize(("shape", "mode"), cases())
def test_textbook(shape, mode, isa):
    check_textbook(shape, mode)


def check_textbook(shape, mode) -> None:
    """A sweep of the first problem whose decisions are clear, against ``room.reference``."""
    seed, want = separated(*shape, mode)
    W0, H = problem(*shape, seed)
    R, W, clear = factor(damped(H)), W0.clone(), want.clear
    got = sweep_(W, R, **MODES[mode])
    if got.mask is not None:
        assert torch.equal(got.mask[clear], want.mask[clear])
        assert not W[~got.mask].any() and not torch.signbit(W[~got.mask]).any()
    if got.codes is None:
        check_weights(W0, W, R, got.mask, 126 if mode == "2:3" else 128)
    else:
        width = MODES[mode]["quant"].width(shape[1])
        scale, zero = (x.repeat_interleave(width, 1)[:, : shape[1]] for x in got[2:4])
        assert torch.equal(got.codes[clear], want.codes[clear])
        assert torch.equal(got.zeros[clear], want.zeros[clear].float())
        torch.testing.assert_close(
            got.scales[clear],
            want.scales[clear].float(),
            rtol=2e-3 if "f16" in mode else 1e-4,
            atol=0,
        )
        assert torch.equal(W, scale * (got.codes.float() - zero))
        if got.mask is not None:
            assert torch.equal(got.codes.float()[~got.mask], zero[~got.mask])
    # The loss is a sum of squares of at most `cols` computed terms, each good to its g's error.
    E = W0.double() - W.double()
    exact = ((E @ damped(H)) * E).sum(1) / 2
    torch.testing.assert_close(got.loss, exact, rtol=2e-5, atol=1e-12)
    torch.testing.assert_close(got.loss[clear], want.loss[clear], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("sparsity", [0.0, 1e-9, 0.31, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("shape", [(1, 7), (3, 129), (50, 300)], ids=str)
def test_exact_count(shape, sparsity, isa):
    check_count(shape, sparsity)


def check_count(shape, sparsity) -> None:
    W, H = problem(*shape)
    got = sweep_(W, factor(damped(H)), sparsity=sparsity)
    assert (~got.mask).sum() == int(W.numel() * sparsity)
    assert torch.equal(W == 0, ~got.mask)


@pytest.mark.parametrize("reference", [False, True])
def test_ties_go_in_row_major_order(reference, isa):
    check_ties(50, 20, reference)


def check_ties(rows, cols, reference) -> None:
    """Equal scores everywhere (H = I, |W| = 1): the first k in row-major order go, or all."""
    W = torch.ones(rows, cols) * (torch.arange(cols) % 2 * 2 - 1)
    got = sweep_(W, torch.eye(cols), sparsity=0.31, reference=reference)
    drop = (~got.mask).flatten()
    k = W.numel() if reference else int(W.numel() * 0.31)
    assert drop[:k].all() and not drop[k:].any()


def test_nm_ties_lower_index_goes(isa):
    got = sweep_(torch.ones(5, 10), torch.eye(10), nm=(1, 4))
    assert got.mask.int().tolist() == [[0, 0, 0, 1, 0, 0, 0, 1, 0, 1]] * 5


@pytest.mark.parametrize("heavy", [0.0, 0.9])
def test_threshold_with_skewed_scores(heavy, isa):
    check_skewed(heavy)


def check_skewed(heavy) -> None:
    """Scores over 60 binary orders, many of them 0: the sampled bracket must not matter."""
    make = torch.Generator().manual_seed(1)
    W = torch.randn(200, 128, generator=make) * torch.exp2(torch.linspace(-30, 30, 200))[:, None]
    W[torch.rand(W.shape, generator=make) < heavy] = 0
    order = (W.flatten() ** 2).sort(stable=True)[1]
    got = sweep_(W, torch.eye(128), sparsity=0.6)
    assert set((~got.mask).flatten().nonzero().flatten().tolist()) == set(
        order[: int(W.numel() * 0.6)].tolist()
    )


def test_given_mask(isa):
    check_given_mask(49, 300)


def check_given_mask(rows, cols) -> None:
    W0, H = problem(rows, cols)
    keep = torch.rand(rows, cols, generator=torch.Generator().manual_seed(3)) < 0.6
    R, W = factor(damped(H)), W0.clone()
    got = sweep_(W, R, mask=keep)
    assert torch.equal(W != 0, keep)
    check_weights(W0, W, R, keep)
    want = room.reference(W0, damped(H), mask=keep)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["half", "2:4", "int4 g128", "2:4 int4"])
def test_narrow_weights_are_the_float_result_rounded(dtype, mode, isa):
    check_narrow(33, 260, dtype, mode)


def check_narrow(rows, cols, dtype, mode) -> None:
    W0, H = problem(rows, cols)
    W, R = W0.to(dtype), factor(damped(H))
    wide = W.float()
    a, b = sweep_(W, R, **MODES[mode]), sweep_(wide, R, **MODES[mode])
    assert torch.equal(W, wide.to(dtype))
    assert all(x is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_for_any_thread_count(mode):
    W0, H = problem(500, 260)
    R, results, before = factor(damped(H)), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            W = W0.clone()
            results.append((W, *sweep_(W, R, **MODES[mode])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(x is y or torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("quant", [m["quant"] for n, m in MODES.items() if n.startswith("int")])
def test_round_to_nearest(quant, isa):
    check_rounding(quant)


def check_rounding(quant) -> None:
    W = torch.randn(50, 200, generator=torch.Generator().manual_seed(2))
    W[:, 32:64] = 0  # a group of nothing but zeros
    W[3] = 0
    Wq, codes, scales, zeros = room.quantize(W, quant)
    sure = []
    for g, w in enumerate(W.double().split(quant.width(200), 1)):
        scale, zero, clear = quant.grid(w)
        clear &= (w != 0).any(1)  # a grid of nothing has range (-1, 1): its zero is a tie
        code = quant.code(w, scale[:, None], zero[:, None])
        for nudge in (1 - 1e-5, 1 + 1e-5):
            clear &= (quant.code(w * nudge, scale[:, None], zero[:, None]) == code).all(1)
        part = slice(g * quant.width(200), g * quant.width(200) + w.shape[1])
        assert torch.equal(codes[clear, part].double(), code[clear])
        assert torch.equal(zeros[clear, g].double(), zero[clear])
        at = codes[:, part].float() - zeros[:, g, None]
        assert torch.equal(Wq[:, part], scales[:, g, None] * at)
        sure.append(clear.double().mean())
    assert max(sure) > 0.4, "too few rows with clear decisions to test anything"
    assert not Wq[W == 0].any()


@pytest.mark.parametrize("mode", ["half", "2:4", "int4 g128", "int3 g32 symmetric", "2:4 int4"])
def test_sweep_beats_no_update(mode):
    """OBS must lose less than magnitude pruning or rounding to nearest under the same H."""
    W0, H = problem(64, 300)
    H = damped(H)
    W = W0.clone()
    got = sweep_(W, factor(H), **MODES[mode])
    plain = W0 * got.mask if got.mask is not None else W0
    if got.codes is not None:
        plain = room.quantize(plain, MODES[mode]["quant"])[0]
    E = (W0 - plain).double()
    assert got.loss.sum() < 0.9 * ((E @ H) * E).sum() / 2


@pytest.mark.parametrize("mode", ["half", "2:4", "int4 g128", "2:4 int4"])
@pytest.mark.parametrize("kind", ["few tokens", "dead columns", "layernorm"])
def test_degenerate_hessians(kind, mode, isa):
    check_degenerate(kind, mode)


def check_degenerate(kind, mode) -> None:
    W0, H = problem(40, 256, tokens=30 if kind == "few tokens" else 0)
    if kind == "dead columns":
        H[:, 10:20] = H[10:20] = 0
    if kind == "layernorm":  # inputs with sum x_j / w_j = 0: H v = 0
        v = torch.linspace(0.5, 2, 256, dtype=torch.float64)
        P = torch.eye(256, dtype=torch.float64) - torch.outer(v, v) / (v @ v)
        H = P @ H @ P
    H = damped(H)
    R, W = factor(H), W0.clone()
    got = sweep_(W, R, **MODES[mode])
    E = (W0 - W).double()
    H = R.double() @ R.double().T  # what the sweep was given; H itself is close to singular
    torch.testing.assert_close(got.loss, ((E @ H) * E).sum(1) / 2, rtol=1e-4, atol=1e-9)
    want = room.reference(W0, H, **MODES[mode])
    assert got.loss.sum() < 1.002 * want.loss.sum()


def test_empty():
    for rows, cols in ((0, 8), (4, 0), (0, 0)):
        W = torch.zeros(rows, cols)
        got = sweep_(W, torch.eye(cols), nm=(2, 4), quant=Quant(4, 32))
        assert got.mask.shape == got.codes.shape == (rows, cols)
        assert got.loss.tolist() == [0.0] * rows
        assert room.quantize(W, Quant(4, 0))[0].shape == (rows, cols)
