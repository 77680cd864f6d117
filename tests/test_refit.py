"""Refit and ADMM against float64: bounds of csrc/refit/refit.h, optimality, counts.

The check_* functions are also run on the simulated CUDA kernels (test_cuda_sim_refit.py).
"""

import math

import pytest
import syncs
import torch
from test_obs import problem

from distaya_ext.errors import InputError, UsageError
from distaya_ext.ops import refit as room
from distaya_ext.ops.refit import admm, refit, refitted

U = 2.0**-24
SHAPES = [(1, 1), (3, 37), (33, 100), (20, 300)]
MASKS = ["half", "few", "mixed"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def terms(cols: int) -> float:
    """core/gemm.h: what a sum of so many products loses, in u."""
    return 384 + cols / 384


def masked(rows: int, cols: int, kind: str, seed: int = 0) -> torch.Tensor:
    """mixed: rows with everything pruned, everything kept, one kept, and any."""
    share = {"half": 0.5, "few": 0.1, "mixed": 0.5}[kind]
    mask = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < share
    if kind == "mixed":
        mask[::4] = False
        mask[1::4] = True
        mask[2::4] = torch.arange(cols) == cols // 2
    return mask


def hessian(cols: int, tokens: int = 0, seed: int = 0) -> torch.Tensor:
    return problem(1, cols, seed, tokens)[1].float()


def loss(Q: torch.Tensor, T: torch.Tensor, H: torch.Tensor, damp: float = 0.01) -> torch.Tensor:
    """1/2 E H' E^T per row in float64."""
    E = T.double() - Q.double()
    return ((E @ room.damped(H, damp)) * E).sum(1) / 2


def check_one_step(rows: int, cols: int, kind: str, most: float) -> None:
    """Q after one iteration, element by element: what each sum loses, carried on to first order.
    most: a product's terms' worth of u."""
    T, mask, H = problem(rows, cols)[0], masked(rows, cols, kind), hessian(cols)
    got = refitted(T, mask, H, iterations=1)
    want, _ = room.reference(T, mask, H, iterations=1)
    A, N, k = room.damped(H, 0.01), (most + 4) * U, cols * U
    D, E = A.diagonal(), T.double() * ~mask
    A_size = A.abs()
    r, dr = (E @ A) * mask, N * (E.abs() @ A_size) * mask
    z, dz = r / D, (dr + 4 * U * r.abs()) / D
    y, dy = z @ A, dz @ A_size + N * (z.abs() @ A_size)
    rz, py = (r * z).sum(1, keepdim=True), (z * y).sum(1, keepdim=True)
    drz = ((2 * dr + (k + 4 * U) * r.abs()) * z.abs()).sum(1, keepdim=True)
    dpy = (dz * y.abs() + z.abs() * (dy + (k + 4 * U) * y.abs())).sum(1, keepdim=True)
    moves = rz[:, 0] > 0
    a, da = rz / py, drz / py + rz / py * (dpy / py + 2 * U)
    dQ = a * dz + da * z.abs() + 2 * U * (want.abs() + (a * z).abs())
    assert float((da / a)[moves].max() if moves.any() else 0) < 0.05  # else first order is not it
    excess = (got.W - want).abs() - 1.1 * dQ
    assert bool((excess[moves] <= 0).all())
    assert torch.equal(got.W[~moves], (T * mask)[~moves])


def check_losses(rows: int, cols: int, kind: str, iterations: int) -> None:
    """What is said of L before and after is so, up to the rounding of `before`."""
    T, mask, H = problem(rows, cols)[0], masked(rows, cols, kind), hessian(cols)
    start = T + 0.3 * problem(rows, cols, seed=9)[0]
    for begin in (None, start):
        got = refitted(T, mask, H, start=begin, iterations=iterations)
        before = loss((T if begin is None else begin) * mask, T, H)
        E = (T - (T if begin is None else begin) * mask).abs().double()
        size = ((E @ room.damped(H, 0.01).abs()) * E).sum(1) / 2
        bound = (terms(cols) + cols + 8) * U * size
        assert bool(((got.before - before).abs() <= bound).all())
        assert bool(((got.after - loss(got.W, T, H)).abs() <= 10 * bound).all())
        assert bool((got.after <= got.before).all())


def check_optimum(rows: int, cols: int, kind: str, damp: float, tokens: int = 0) -> None:
    """Run until every row stops: L is the least there is, up to what header and spectrum allow.

    Some step had rz <= 4 tau^2 steps, L never rises after it, and L - L* = 1/2 r (H'_SS)^-1 r with
    |r| <= sqrt(rz) + drift, drift <= tau.
    """
    T, mask, H = problem(rows, cols)[0], masked(rows, cols, kind), hessian(cols, tokens)
    steps = 2 * cols + 20
    Q = refit(T, mask, H, damp=damp, iterations=steps)
    best = loss(room.backsolve(T, mask, H, damp), T, H, damp)
    assert not Q[~mask].any()
    _, path = room.reference(T, mask, H, damp=damp, iterations=steps)
    A = room.damped(H, damp)
    D = A.diagonal()
    tau = cols * U * ((T.double() ** 2 * D).sum(1).sqrt() * 2**0.5 + path)
    unit = A / D.sqrt() / D.sqrt()[:, None]
    for i, keep in enumerate(mask):
        over = loss(Q[i : i + 1], T[i : i + 1], H, damp)[0] - best[i]
        if not keep.any():
            assert not Q[i].any()
            continue
        least = torch.linalg.eigvalsh(unit[keep][:, keep])[0]
        assert -1e-12 <= over <= (tau[i] * (2 * steps**0.5 + 1)) ** 2 / (2 * least) + 1e-12


def check_monotone(rows: int, cols: int, damp: float, tokens: int, steps: list[int]) -> None:
    """L (in float64, of the float32 result) never rises with more iterations: no tolerance."""
    T, H = problem(rows, cols)[0], hessian(cols, tokens)
    mask = masked(rows, cols, "half")
    last = loss(T * mask, T, H, damp)
    for iterations in steps:
        now = loss(refit(T, mask, H, damp=damp, iterations=iterations), T, H, damp)
        assert bool((now <= last).all()), iterations
        last = now


def check_from_the_optimum(rows: int, cols: int, damp: float) -> None:
    """Nothing but rounding is left to gain: nothing gets worse, and most rows are left alone."""
    T, mask, H = problem(rows, cols)[0], masked(rows, cols, "half"), hessian(cols)
    best = room.backsolve(T, mask, H, damp).float()
    Q = refit(T, mask, H, start=best, damp=damp, iterations=30)
    assert bool((loss(Q, T, H, damp) <= loss(best, T, H, damp)).all())
    assert (best == Q).all(1).double().mean() >= 0.5


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_step(shape, kind, isa):
    check_one_step(*shape, kind, terms(shape[1]))


@pytest.mark.parametrize("iterations", [0, 1, 2, 7])
@pytest.mark.parametrize("kind", MASKS)
def test_losses(kind, iterations):
    check_losses(20, 130, kind, iterations)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_optimum(shape, kind, isa):
    check_optimum(*shape, kind, damp=0.01)


@pytest.mark.parametrize("damp", [0.1, 1e-3, 1e-5])
@pytest.mark.parametrize("tokens", [20, 150])
def test_optimum_of_singular_hessians(tokens, damp):
    check_optimum(16, 300, "half", damp, tokens)


@pytest.mark.parametrize(("damp", "tokens"), [(0.01, 0), (0.01, 60), (1e-4, 60), (0.0, 100)])
@pytest.mark.parametrize("cols", [37, 300, 512])
def test_never_worse(cols, damp, tokens):
    check_monotone(30, cols, damp, tokens, [*range(1, 30), 40, 60, 100, 200, 400])


@pytest.mark.parametrize("damp", [0.01, 1e-4])
@pytest.mark.parametrize("cols", [37, 300])
def test_from_the_optimum(cols, damp):
    check_from_the_optimum(30, cols, damp)


def test_as_near_the_optimum_as_float64():
    """Ten iterations lose next to nothing by their rounding: within 1e-4 of the whole gain."""
    T, mask, H = problem(40, 512)[0], masked(40, 512, "half"), hessian(512, 300)
    ours = loss(refit(T, mask, H), T, H)
    textbook = loss(room.reference(T, mask, H)[0], T, H)
    gain = loss(T * mask, T, H) - textbook
    assert bool(((ours - textbook).abs() <= 1e-4 * gain).all())
    assert float(gain.sum()) > 0.5 * float(loss(T * mask, T, H).sum())


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_any_scale(scale):
    """H and 2^40 H, W and 2^-20 W: the same weights, bit for bit at powers of two."""
    T, mask, H = problem(9, 130)[0], masked(9, 130, "half"), hessian(130)
    power = 2.0 ** round(math.log2(scale))
    want = refit(T, mask, H)
    assert torch.equal(refit(T, mask, H * power), want)
    assert torch.equal(refit(T * power**0.5, mask, H), want * power**0.5)


def check_dead_columns() -> None:
    """An input that never fired: its weight is the target's if damped, the start's if not."""
    T, mask, H = problem(8, 40)[0], masked(8, 40, "half"), hessian(40)
    for j in (0, 7, 39):
        H[j] = H[:, j] = 0
        mask[:, j] = True
    start = T + 1
    damped, plain = (refit(T, mask, H, start=start, damp=d, iterations=60) for d in (0.01, 0.0))
    assert torch.equal(plain[:, [0, 7, 39]], start[:, [0, 7, 39]])
    torch.testing.assert_close(damped[:, [0, 7, 39]], T[:, [0, 7, 39]], rtol=1e-3, atol=1e-3)
    assert damped.isfinite().all() and plain.isfinite().all()
    for zeros in (refit(T, mask, 0 * H), refit(T, mask, 0 * H, damp=0.0)):
        assert torch.equal(zeros, T * mask)
    assert torch.equal(refit(T, mask, -torch.eye(40)), T * mask)  # no step is one down


def test_dead_columns(isa):
    check_dead_columns()


def check_target_and_start(cols: int = 60, iterations: int = 150) -> None:
    """T is the target where one is given; where the search starts does not decide where it ends."""
    W, target = problem(12, cols)[0], problem(12, cols, seed=3)[0]
    mask, H = masked(12, cols, "mixed"), hessian(cols)
    free = refit(W, mask, H, target=target, iterations=iterations)
    assert torch.equal(free, refit(target, mask, H, iterations=iterations))
    other = refit(W, mask, H, target=target, start=10 * W, iterations=iterations)
    far = loss(10 * W * mask, target, H)
    assert bool(((loss(other, target, H) - loss(free, target, H)).abs() <= 1e-8 * far).all())
    assert float(far.max()) > 1
    assert torch.equal(refit(W, mask, H, start=target, iterations=0), target * mask)
    dirty = target.where(mask, torch.nan)  # off the mask nothing of the start is read
    assert torch.equal(
        refit(W, mask, H, start=dirty, iterations=3), refit(W, mask, H, start=target, iterations=3)
    )
    whole = torch.ones_like(mask)
    assert torch.equal(refit(W, whole, H), W)


def test_target_and_start(isa):
    check_target_and_start()


def check_dtypes(rows: int, cols: int) -> None:
    """16-bit weights are widened, and the float32 result is rounded once."""
    mask, H = masked(rows, cols, "half"), hessian(cols)
    for dtype in DTYPES:
        W = problem(rows, cols)[0].to(dtype)
        assert torch.equal(refit(W, mask, H), refit(W.float(), mask, H).to(dtype))
        for other in DTYPES:
            target = problem(rows, cols, seed=4)[0].to(other)
            got = refit(W, mask, H, target=target, start=W.to(other))
            want = refit(W.float(), mask, H, target=target.float(), start=W.to(other).float())
            assert got.dtype == dtype and torch.equal(got, want.to(dtype))


def test_dtypes(isa):
    check_dtypes(5, 77)


def test_strides():
    W, mask, H = problem(14, 40)[0], masked(14, 40, "half"), hessian(40)
    target, start = problem(14, 40, seed=1)[0], problem(14, 40, seed=2)[0]
    want = refit(W, mask, H, target=target, start=start)

    def strided(x: torch.Tensor) -> torch.Tensor:
        return x.t().contiguous().t()

    parts = {"target": strided(target), "start": strided(start)}
    got = refit(strided(W), strided(mask), H, **parts)
    assert got.is_contiguous() and torch.equal(got, want)
    assert torch.equal(
        refit(W, mask.repeat_interleave(2, 1)[:, ::2], H, target=target, start=start), want
    )


def test_a_row_depends_on_nothing_else(threads):
    """Not on threads, nor on the rows beside it: 140000 rows of 64 columns are two runs of rows."""
    W, H = problem(140000, 64)[0], hessian(64)
    mask = masked(140000, 64, "half")
    all_rows = refit(W, mask, H, iterations=3)
    for part in (slice(0, 1), slice(777, 790), slice(131060, 131090), slice(139990, 140000)):
        assert torch.equal(all_rows[part], refit(W[part], mask[part], H, iterations=3))
    torch.set_num_threads(3 - threads)
    T, keep, H = problem(70, 300)[0], masked(70, 300, "half"), hessian(300)
    first = refit(T, keep, H), *admm(T, H, sparsity=0.5, iterations=7)
    torch.set_num_threads(threads)
    again = refit(T, keep, H), *admm(T, H, sparsity=0.5, iterations=7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def check_nan() -> None:
    """NaN stays in its row, where it is seen; infinities too."""
    T, mask, H = problem(6, 50)[0], masked(6, 50, "half"), hessian(50)
    want = refit(T, mask, H)
    for value in (math.nan, math.inf):
        bad = T.clone()
        bad[2, 3] = value
        got = refit(bad, mask, H)
        assert not got[2].isfinite().all()
        rest = torch.arange(6) != 2
        assert torch.equal(got[rest], want[rest])
    H[4, 5] = H[5, 4] = math.nan
    assert refit(T, mask, H).isnan().any(1).all()


def test_nan(isa):
    check_nan()


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)], ids=str)
def test_empty_matrices(shape):
    W, H = torch.empty(shape), torch.eye(shape[1])
    got = refitted(W, torch.ones(shape, dtype=torch.bool), H)
    assert got.W.shape == shape and not got.before.any() and not got.after.any()
    assert admm(W, H, sparsity=0.5)[1].shape == shape


def test_nothing_waits_for_the_device():
    T, mask, H = problem(6, 52)[0], masked(6, 52, "half"), hessian(52)
    with syncs.Recorder() as recorder:
        refit(T, mask, H, start=T)
        admm(T, H, sparsity=0.5)
        admm(T, H, nm=(2, 4))
    assert recorder.found == []


def test_opcheck_and_one_graph():
    T, mask, H = problem(6, 52)[0], masked(6, 52, "half"), hessian(52)
    rows = torch.zeros(6, dtype=torch.float64)
    arguments = (T, mask, H, None, 0.01, 2, T.clone(), rows, rows.clone())
    torch.library.opcheck(room.refit_, arguments)
    torch.library.opcheck(room.admm_, (T.clone(), T.clone(), mask, T, H, 1.0, 0.5))
    torch.library.opcheck(room.multiply_, (T.clone(), T, H))
    compiled = torch.compile(refit, fullgraph=True, backend="aot_eager")(T, mask, H)
    assert torch.equal(compiled, refit(T, mask, H))


def wrong_calls() -> list:
    T, mask, H = problem(8, 20)[0], masked(8, 20, "half"), hessian(20)
    return [
        (lambda: refit(T[0], mask, H), r"W must have 2 dimensions but is float32 \[20\]"),
        (lambda: refit(T, mask[:, :19], H), r"mask \(bool \[8, 19\].* does not fit W"),
        (lambda: refit(T, mask.float(), H), "mask must be bool"),
        (lambda: refit(T, mask, H[:19, :19].contiguous()), r"H \(.*\[19, 19\].* does not fit W"),
        (lambda: refit(T, mask, H.double()), "H must be float32"),
        (lambda: refit(T, mask, H[:, ::2]), r"H .* is not contiguous"),
        (lambda: refit(T.double(), mask, H), "W is float64 but must be one of"),
        (lambda: refit(T, mask, H, target=T.double()), "target is float64"),
        (lambda: refit(T, mask, H, target=T[:7]), r"target \(.*\[7, 20\].* does not fit W"),
        (lambda: refit(T, mask, H, start=T[:, :3]), r"start \(.*\[8, 3\].* does not fit W"),
        (lambda: refit(T, mask, H, damp=-0.1), "damp must be a finite number >= 0 but is -0.1"),
        (lambda: refit(T, mask, H, damp=math.nan), "damp .* is nan"),
        (lambda: refit(T, mask, H, iterations=-1), "iterations must be at least 0 but are -1"),
        (lambda: refit(T.requires_grad_(), mask, H), "requires grad"),
        (lambda: room.multiply_(H, H, H), "must not be the memory"),
        (lambda: room.admm_(H, H.clone(), H > 0, H, H, 0.0, 1.0), "rho must be"),
        (lambda: room.admm_(H, H.clone(), H > 0, H, H, 1.0, math.inf), "ratio must be .* inf"),
    ]


@pytest.mark.parametrize("index", range(17))
def test_refused(index):
    call, sentence = wrong_calls()[index]
    with pytest.raises(ValueError, match=sentence):
        call()
    assert len(wrong_calls()) == 17
    assert issubclass(UsageError, ValueError) and issubclass(InputError, ValueError)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(1, 1), (3, 129), (130, 300), (700, 512)], ids=str)
def test_cuda_twin(shape):
    """The CPU's gain within 1e-4 of it, and nothing pruned comes back."""
    T, mask, H = problem(*shape)[0], masked(*shape, "half"), hessian(shape[1])
    here = refitted(T, mask, H)
    there = refitted(T.cuda(), mask.cuda(), H.cuda())
    assert not there.W[~mask.cuda()].any()
    gain = here.before - here.after
    least = loss(here.W, T, H)
    assert bool(((loss(there.W.cpu(), T, H) - least).abs() <= 1e-4 * gain + 1e-12).all())
