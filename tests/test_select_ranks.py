"""One matrix whose rows lie on several ranks: every bit is that of one process with all of them."""

import pytest
import torch
from fake_ranks import FakeRanks, check_admm, check_keep, check_sweep, same, together
from ranked import run_ranks
from test_obs import damped, factor, problem

from distaya_ext.errors import InputError
from distaya_ext.ops import mask as mask_op
from distaya_ext.ops.among import Among
from distaya_ext.ops.obs import Quant, obs, sweep_
from distaya_ext.ops.refit import admm
from distaya_ext.ranks import team

ROWS = 70
SHARES = [(70,), (35, 35), (0, 70), (70, 0), (1, 0, 69), (20, 0, 30, 1, 19), (0, 0, 1, 69, 0)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODES = {
    "half": {"sparsity": 0.5},
    "nearly all": {"sparsity": 0.999},
    "hardly any": {"sparsity": 1e-4},
    "none": {"sparsity": 0.0},
    "published": {"sparsity": 0.5, "reference": True},
    "half int4 g64": {"sparsity": 0.5, "quant": Quant(4, 64)},
    "70% int4 row": {"sparsity": 0.7, "quant": Quant(4, 0)},
}


def few_values(kind: str, rows: int = ROWS, cols: int = 150) -> torch.Tensor:
    make = torch.Generator().manual_seed(3)
    if kind == "three":
        return torch.randint(-1, 2, (rows, cols), generator=make).float()
    if kind == "rows":  # one value in each row: ties of whole runs
        return torch.randint(0, 3, (rows, 1), generator=make).float().expand(rows, cols).clone()
    return torch.full((rows, cols), {"equal": -1.5, "zeros": 0.0}[kind])


@pytest.mark.parametrize("rows", SHARES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_sweep(rows, mode, isa):
    W, H = problem(ROWS, 300)
    check_sweep(W, factor(damped(H)), rows, MODES[mode])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_dtypes_and_threads(dtype, threads):
    W, H = problem(ROWS, 200)
    for rows in ((20, 0, 30, 1, 19), (35, 35)):
        check_sweep(W.to(dtype), factor(damped(H)), rows, MODES["half int4 g64"])


@pytest.mark.parametrize("kind", ["three", "rows", "equal", "zeros"])
@pytest.mark.parametrize("reference", [False, True])
def test_ties(kind, reference, isa):
    """R = I: scores are squares. Ties end in any rank, in any row of it."""
    W, R = few_values(kind), torch.eye(150)
    for sparsity in (0.01, 0.3, 0.5, 0.9):
        for rows in SHARES[1:]:
            check_sweep(W, R, rows, {"sparsity": sparsity, "reference": reference})


def test_random_shares_of_ties():
    make = torch.Generator().manual_seed(11)
    W, R = few_values("three", ROWS, 40), torch.eye(40)
    for _ in range(40):
        world = int(torch.randint(2, 6, (1,), generator=make))
        ends = torch.randint(0, ROWS + 1, (world - 1,), generator=make).sort().values.tolist()
        rows = tuple(b - a for a, b in zip([0, *ends], [*ends, ROWS], strict=True))
        sparsity = float(torch.rand(1, generator=make))
        check_sweep(W, R, rows, {"sparsity": sparsity})
        check_keep(W, int(sparsity * W.numel()), rows)


def test_what_is_exchanged():
    """Three tables per block of 128 columns, and none where rows are independent."""
    W, H = problem(ROWS, 300)
    R = factor(damped(H))
    ranks = check_sweep(W, R, (35, 0, 35), {"sparsity": 0.5})
    assert ranks.sizes == [[2048, 1024, 1024] * 3] * 3
    keep = torch.rand(ROWS, 300) > 0.5
    for options in ({"nm": (2, 4)}, {"mask": keep}, {"quant": Quant(4, 64)}, {"sparsity": 0.0}):
        assert check_sweep(W, R, (35, 0, 35), options).sizes == [[]] * 3
    assert check_keep(W, 100, (35, 0, 35)).sizes == [[257] * 4] * 3
    iterations = {"sparsity": 0.5, "iterations": 3, "levels": 2}
    assert check_admm(W, H.float(), (35, 0, 35), iterations).sizes == [[257] * 4 * 4] * 3


@pytest.mark.parametrize("order", ["natural", "activation", "given"])
def test_the_whole_call(order):
    """obs from H, with an order and grids of whole rows; a team of one gets what it had."""
    W, H = problem(ROWS, 300)
    H = H.float()
    by = (
        torch.randperm(300, generator=torch.Generator().manual_seed(1))
        if order == "given"
        else order
    )
    for options in ({"quant": Quant(4, 0)}, {"reference": True}, {}):
        options = {"sparsity": 0.5, "order": by, **options}
        want = obs(W, H, **options)
        for rows in ((70,), (30, 0, 40)):
            ranks = FakeRanks(rows)
            found = ranks.results(
                lambda r, among, k=ranks, o=options: obs(k.own(r, W), H, **o, among=among)
            )
            parts = [(f.W, f.mask, f.codes, f.scales, f.zeros, f.loss) for f in found]
            assert same(
                together(parts), (want.W, want.mask, want.codes, want.scales, want.zeros, want.loss)
            )
            assert {f.floored for f in found} == {want.floored}


# ---- the k best of a matrix ----


def scores_of(kind: str) -> torch.Tensor:
    S = torch.randn(ROWS, 37, generator=torch.Generator().manual_seed(5))
    if kind == "ties":
        S = (S * 2).round()  # both zeros among them
        S.view(-1)[::17] = float("inf")
        S.view(-1)[5::31] = -float("inf")
    if kind == "NaN":
        S[29, 7] = S[31, 0] = S[69, 36] = float("nan")
        S[40] = -float("nan")
    if kind == "zeros":
        S = S * 0
    return S


@pytest.mark.parametrize("rows", SHARES, ids=str)
@pytest.mark.parametrize("kind", ["random", "ties", "NaN", "zeros"])
def test_keep_k(rows, kind, isa):
    S = scores_of(kind)
    for k in (0, 1, 5, 700, 1295, S.numel() - 1, S.numel()):
        check_keep(S, k, rows)


def test_a_large_matrix_of_ties():
    """Several tasks of 65536 scores on each rank."""
    S = (torch.randn(3000, 90, generator=torch.Generator().manual_seed(6)) * 1.5).round()
    check_keep(S, 100_001, (1300, 0, 1700))


def test_keep_k_names_the_nan_of_the_matrix():
    S, ranks = scores_of("NaN"), FakeRanks((30, 40))
    found = ranks.call(lambda r, among: mask_op.keep_k(ranks.own(r, S), 9, "matrix", among))
    assert {str(error) for error in found} == {
        "scores [70, 37] is NaN at row 29, column 7: it has no rank"
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"sparsity": 0.9}, {"nm": (2, 4)},
                                     {"sparsity": 0.5, "along": "row"}], ids=str)  # fmt: skip
def test_admm(options, dtype, isa):
    W, H = problem(ROWS, 64)
    for rows in ((35, 35), (1, 0, 69), (0, 70)):
        check_admm(W.to(dtype), H.float(), rows, {**options, "iterations": 6, "levels": 3})


# ---- what goes wrong ----


@pytest.mark.parametrize("sparsity", [0.3, 0.97])
def test_nan_ends_all_ranks_or_none(sparsity, isa):
    """As in one process: NaN is an error only where so many have to go that it would be one."""
    W, R = few_values("three", ROWS, 40), torch.eye(40)
    W[33:] = float("nan")
    whole = W.clone()
    if sparsity < 0.5:
        check_sweep(W, R, (20, 0, 30, 20), {"sparsity": sparsity})
        return
    with pytest.raises(ValueError, match="70 x 40 scores cannot be ordered") as expected:
        sweep_(whole, R, sparsity=sparsity)
    ranks = FakeRanks((20, 0, 30, 20))
    found = ranks.call(
        lambda r, among: sweep_(ranks.own(r, W).clone(), R, sparsity=sparsity, among=among)
    )
    assert [str(error) for error in found] == [str(expected.value)] * 4


class BrokenError(Exception):
    """What a failing exchange raises."""


def test_an_error_of_the_exchange_arrives_as_it_is():
    def broken(_table: torch.Tensor) -> torch.Tensor:
        raise BrokenError("no answer")

    W, R = few_values("three"), torch.eye(150)
    among = Among(0, (ROWS, 3), broken)
    with pytest.raises(BrokenError, match="no answer"):
        sweep_(W.clone(), R, sparsity=0.5, among=among)
    with pytest.raises(BrokenError, match="no answer"):
        mask_op.mask_keep_k_among(W, 100, among)


def test_refusals():
    W, H = problem(6, 256)
    H, R = H.float(), factor(damped(H))
    alone = Among(0, (6, 4), lambda table: table[None])
    other = alone._replace(exchange=lambda table: torch.stack([table + 1, table]))
    cases = [
        (lambda: sweep_(W[:5].clone(), R, sparsity=0.5, among=alone), "5 rows but has 6 of among"),
        (lambda: sweep_(W, R, sparsity=0.5, among=alone._replace(rank=2)), "2 is none of the 2"),
        (lambda: sweep_(W.clone(), R, sparsity=0.5, among=alone), r"2 ranks gave \[1, 2048\]"),
        (
            lambda: sweep_(W.clone(), R, sparsity=0.5, among=other),
            "0 other counts than its own 2048",
        ),
        (lambda: mask_op.keep_k(W, 3, "row", alone), "among goes with along='matrix', not 'row'"),
        (lambda: admm(W[:2], H, sparsity=0.5, among=alone), "2 rows but has 6"),
        (lambda: obs(W, H, sparsity=0.5, order="block", among=alone), "6 of 10: give the perm"),
        (lambda: obs(W, H, nm=(2, 4), order="group", among=alone), "6 of 10: give the perm"),
    ]
    for call, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            call()
    with pytest.raises(ValueError, match="cannot keep 2561 of the 2560 scores of a matrix"):
        mask_op.mask_keep_k_among(W, 2561, alone)


# ---- processes ----


def _by_a_team(sparsity: float) -> list[bytes]:
    """What this rank has of a sweep, an ADMM and a mask; called by every process."""
    W, H = problem(ROWS, 300)
    own = team().share(ROWS)
    rows = tuple(s.stop - s.start for s in team().shares(ROWS))
    among = Among(team().rank, rows, team().all_gather)
    found = obs(W[own], H.float(), sparsity=sparsity, quant=Quant(4, 64), among=among)
    D, kept = admm(W[own], H.float(), sparsity=sparsity, iterations=4, levels=2, among=among)
    ties = mask_op.keep_k((W[own] * 2).round(), 10_001, "matrix", among)
    tensors = (found.W, found.mask, found.codes, found.loss, D, kept, ties)
    return [t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors]


@pytest.mark.parametrize("world", [2, 3])
def test_processes(world):
    expected = _by_a_team(0.6)
    parts = run_ranks(world, _by_a_team, 0.6)
    assert [b"".join(column) for column in zip(*parts, strict=True)] == expected
