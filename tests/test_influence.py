"""Similarity and divergence against float64, within the bounds of csrc/influence/influence.h.

The check_* functions are also run on the simulated CUDA kernels (test_cuda_sim_influence.py).
"""

import math
import subprocess
import sys
from fractions import Fraction

import pytest
import torch

from distaya_ext.errors import InputError
from distaya_ext.ops import influence as room
from distaya_ext.ops.influence import divergence, similarity

U = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = {
    "plain": {},
    "scaled": {"scale": 0.0625},
    "capped": {"scale": 0.5, "cap": 4.0},
    "all": {"scale": 2.0, "cap": 30.0, "bias": True},
}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def terms(hidden: int) -> float:
    """core/gemm.h: what a product of so many terms loses, in u."""
    return min(hidden, 384 + hidden / 384)


# ---- similarity ----


def check_similarity(tokens: int, hidden: int, dtype: torch.dtype, apart: float) -> None:
    X = randn(tokens, hidden).to(dtype)
    Y = (X.double() + apart * randn(tokens, hidden, seed=1)).to(dtype)
    found, exact = similarity(X, Y).double(), room.reference_similarity(X, Y)
    slack = 4e-15 * hidden**0.5 * torch.tensor([1.0, 1.0, 0.0])  # on either side
    assert bool(((found - exact).abs() <= 1.01 * U * exact + slack).all())


@pytest.mark.parametrize("apart", [0.0, 1e-6, 1e-2, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_similarity_is_correct_to_rounding(dtype, apart, isa, threads):
    for tokens, hidden in ((1, 1), (3, 5), (40, 64), (17, 1031)):
        check_similarity(tokens, hidden, dtype, apart)


def test_nearly_equal_rows_keep_their_digits():
    """Against 1 - cos = (|x|^2 |y|^2 - (x y)^2) / (n (n + x y)), n = |x| |y|: exact on top."""
    X = randn(6, 19)
    for seed in range(1, 4):
        Y = X * (1 + 1e-6 * randn(6, 19, seed=seed))
        found = similarity(X, Y)
        for x, y, row in zip(X.tolist(), Y.tolist(), found, strict=True):
            x, y = ([Fraction(v) for v in part] for part in (x, y))
            xx, yy = (sum(v * v for v in part) for part in (x, y))
            xy = sum(v * w for v, w in zip(x, y, strict=True))
            n = math.sqrt(xx * yy)
            away = float(xx * yy - xy * xy) / (n * (n + float(xy)))
            assert 0 < away < 1e-11  # what fp32 would call 0
            assert float(row[0]) == pytest.approx(away, rel=1e-6)
            assert float(row[1]) == pytest.approx(math.sqrt(2 * away) / math.pi, rel=1e-6)


def check_special_rows() -> None:
    inf, nan = math.inf, math.nan
    one, zero = [3.0, 4.0, 0.0], [0.0, 0.0, 0.0]
    X = torch.tensor([zero, zero, one, one, one, [nan, 1, 1], one, [inf, 0, 0], one, [4.0, -3, 0]])
    Y = torch.tensor([zero, one, zero, one, [-3.0, -4, 0], one, [nan, 1, 1], one, [1e30] * 3, one])
    found = similarity(X, Y)
    assert found[0].tolist() == [0, 0, 0] and found[1].tolist() == [1, 0.5, inf]
    assert found[2].tolist() == [1, 0.5, 1] and found[3].tolist() == [0, 0, 0]
    assert found[4].tolist() == [2, 1, 2]
    assert bool(found[5:8].isnan().all()) and bool(found[8].isfinite().all())
    assert found[9, :2].tolist() == [1, 0.5]
    for size in (1e-30, 1e30):  # neither squares that vanish nor such that overflow
        torch.testing.assert_close(
            similarity(X[8:] * size, X[3:5] * size), similarity(X[8:], X[3:5])
        )


def test_zero_and_odd_rows(isa):
    check_special_rows()


def test_shapes_of_similarity():
    X, Y = randn(2, 5, 33), randn(2, 5, 33, seed=1)
    flat = similarity(X, Y)
    assert flat.shape == (10, 3) and flat.dtype == torch.float32
    assert torch.equal(flat, similarity(X.view(10, 33), Y.view(10, 33)))
    assert torch.equal(similarity(X[:, ::2], Y[:, ::2]), flat.view(2, 5, 3)[:, ::2].reshape(6, 3))
    assert torch.equal(similarity(X.bfloat16(), Y), similarity(X.bfloat16().float(), Y))
    assert similarity(X[:0], Y[:0]).shape == (0, 3)
    assert similarity(randn(4, 0), randn(4, 0)).tolist() == [[0, 0, 0]] * 4
    states = randn(5, 7, 33, seed=2)
    for length in (1, 3, 4):
        runs = room.similarity_runs(states, length)
        assert runs.shape == (5 - length, 7, 3)
        for i, run in enumerate(runs):
            assert torch.equal(run, similarity(states[i], states[i + length]))


# ---- divergence ----


def head(variants, tokens, hidden, vocabulary, dtype=torch.float32, apart=0.1, seed=0, **options):
    """P, Q, W, targets and options of a random head; bias: True for a random one."""
    P = 2 * randn(tokens, hidden, seed=seed)
    Q = (P + apart * randn(variants, tokens, hidden, seed=seed + 1)).to(dtype)
    W = randn(vocabulary, hidden, seed=seed + 2).to(dtype) / hidden**0.5
    targets = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    if options.get("bias"):
        options["bias"] = randn(vocabulary, seed=seed + 3).to(dtype)
    return (P.to(dtype), Q, W, targets), options


def logits_off(P, Q, W, most, scale=1.0, cap=None, bias=None):
    """e of the header, [variants, tokens]."""
    size = [h.double().abs() @ W.double().abs().T for h in (P, Q)]
    size = torch.maximum(size[0].expand_as(size[1]), size[1])
    if bias is not None:
        size = size + bias.double().abs()
    return abs(scale) * (most + 4) * U * size.amax(-1) + 8 * U * (cap or 0)


def allowed(P, Q, W, most, **options):
    """The header's bounds: of KL and of lse, and the distance at which first choices may differ."""
    e = logits_off(P, Q, W, most, **options)
    zp, zq = (room.reference_logits(h, W, **options) for h in (P, Q))
    zp = zp.expand_as(zq)
    p, q, d = zp.softmax(-1), zq.softmax(-1), zp - zq
    mean = lambda x: (p * x).sum(-1)  # noqa: E731
    kl = mean(p.log() - q.log())
    away = (d - mean(d)[..., None]).abs()
    D, lse = mean(away), (5 + math.log(len(W))) * U
    below = zp.amax(-1, keepdim=True) - zp
    of_kl = e * ((p - q).abs().sum(-1) + D) + 6 * e**2 * (1 + D)
    of_kl += U * (mean((5 + below) * away) + 2 * mean(d.abs()) + kl) + 2 * lse
    assert float(e.max()) <= 1 / 8
    return of_kl, lse + 2 * e, 2 * e


def check_divergence(operands, options, most: float) -> torch.Tensor:
    """Every column within its bound; the result."""
    P, Q, W, _ = operands
    found, exact = divergence(*operands, **options), room.reference_divergence(*operands, **options)
    assert found.dtype == torch.float32 and found.shape == exact.shape
    of_kl, of_nll, close = allowed(P, Q, W, most, **options)
    assert bool(((found[..., 0] - exact[..., 0]).abs() <= of_kl).all())
    off = (found[..., 1:3] - exact[..., 1:3]).abs() - U * exact[..., 1:3].abs()
    assert bool((off <= of_nll[..., None]).all())
    clear = torch.ones_like(close, dtype=torch.bool)
    for h in (P, Q):
        top = room.reference_logits(h, W, **options).topk(min(2, len(W))).values
        clear &= top[..., 0] - top[..., -1] > close if len(W) > 1 else clear
    assert bool(clear.any()) and torch.equal(found[..., 3][clear], exact[..., 3][clear].float())
    assert set(found[..., 3].unique().tolist()) <= {0.0, 1.0}
    return found


@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_divergence_within_its_bound(dtype, options, isa, threads):
    for shape in ((1, 1, 1, 2), (2, 3, 37, 50), (3, 5, 64, 1000), (1, 9, 400, 1537)):
        operands, rest = head(*shape, dtype=dtype, **HEADS[options])
        check_divergence(operands, rest, terms(shape[2]))


@pytest.mark.parametrize("apart", [1e-4, 1e-2, 3.0])
def test_near_and_far_distributions(apart, isa):
    """KL from 1e-9 to above 1, with agreeing and with differing first choices."""
    operands, options = head(2, 40, 96, 3000, apart=apart)
    found = check_divergence(operands, options, terms(96))
    assert (0 if apart < 1 else 0.3) <= float(found[..., 0].mean()) <= (apart if apart < 1 else 30)
    assert apart < 1 or 0 < float(found[..., 3].mean()) < 1


def test_several_runs_of_tokens_and_variants():
    """More rows than are worked on at once: runs of tokens, groups of Qs; nothing changes."""
    operands, options = head(1, 2500, 8, 40)
    whole = check_divergence(operands, options, terms(8))
    P, Q, W, targets = operands
    assert torch.equal(whole[:, 2400:], divergence(P[2400:], Q[:, 2400:], W, targets[2400:]))
    operands, options = head(2100, 2, 8, 40)
    whole = check_divergence(operands, options, terms(8))
    P, Q, W, targets = operands
    for i in (0, 2046, 2047, 2099):
        assert torch.equal(whole[i], divergence(P, Q[i], W, targets))


def test_mixed_dtypes_of_operands():
    for p, q, w, b in zip(DTYPES, DTYPES[1:] + DTYPES, (DTYPES * 2)[2:], DTYPES, strict=False):
        (P, Q, W, targets), options = head(2, 3, 32, 100, bias=True)
        options["bias"] = options["bias"].to(b)
        check_divergence((P.to(p), Q.to(q), W.to(w), targets), options, terms(32))


def test_the_same_bits_for_any_number_of_threads_and_alone(isa):
    operands, options = head(3, 70, 200, 2000, dtype=torch.bfloat16, cap=9.0)
    check_divergence(operands, options, terms(200))
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append((divergence(*operands, **options), similarity(*operands[1][:2])))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))
    P, Q, W, targets = operands
    for stacked, q in zip(found[0][0], Q, strict=True):
        assert torch.equal(stacked, divergence(P, q, W, targets, **options))


def check_never_negative() -> None:
    """Equal rows give 0 exactly; nearly equal ones nothing below it, although sums cancel."""
    for apart in (0.0, 1e-8, 1e-6):
        (P, Q, W, targets), _ = head(2, 50, 16, 300, apart=apart)
        found = divergence(P, Q, 20 * W, targets)
        assert bool((found[..., 0] >= 0).all())
        if apart == 0:
            assert not found[..., 0].any() and bool((found[..., 3] == 1).all())
            assert torch.equal(found[..., 1], found[..., 2])


def test_kl_is_never_negative(isa):
    check_never_negative()


def check_odd_values() -> None:
    """NaN stays with its token and side; entries with a bias of -Inf are not there."""
    (P, Q, W, targets), _ = head(2, 4, 24, 90)
    plain = divergence(P, Q, W, targets)
    spoilt_p, spoilt_q = P.clone(), Q.clone()
    spoilt_p[1, 3] = math.nan
    spoilt_q[1, 2, 0] = math.inf
    found = divergence(spoilt_p, spoilt_q, W, targets)
    wrong = torch.zeros(2, 4, 4, dtype=torch.bool)
    wrong[:, 1, [0, 1, 3]] = True
    wrong[1, 2, [0, 2, 3]] = True
    assert torch.equal(found.isnan(), wrong) and torch.equal(found[~wrong], plain[~wrong])
    left_out = torch.arange(90) % 3 == 0
    bias = torch.where(left_out, -math.inf, 0.0)
    targets = torch.tensor([1, 2, 88, 0])
    found = divergence(P, Q, W, targets, bias=bias)
    rest = torch.arange(90)[~left_out]
    fewer = divergence(P, Q, W[rest], torch.tensor([0, 1, 58, 0]))
    torch.testing.assert_close(found[:, :3], fewer[:, :3], rtol=1e-5, atol=1e-5)
    assert bool((found[:, 3, 1:3] == math.inf).all()) and bool(found[:, 3, 0].isfinite().all())


def test_odd_values(isa):
    check_odd_values()


def check_first_choices() -> None:
    """Of equal logits the first is chosen, over blocks of the vocabulary too."""
    W = torch.zeros(1700, 4)
    W[[5, 900, 1650]] = 1.0
    P, Q = torch.ones(1, 4), torch.ones(2, 1, 4)
    Q[1] = -1  # now 0 is the first of the best
    assert divergence(P, Q, W, torch.tensor([0]))[..., 3].tolist() == [[1], [0]]
    W[5], W[1650] = 0.5, torch.tensor([0.0, 1, 1, 2])
    Q[0] = torch.tensor([2.0, 1, 1, 1])  # p has 900 and 1650 alike, q likes 900 better
    assert divergence(P, Q, W, torch.tensor([0]))[..., 3].tolist() == [[1], [0]]


def test_of_equal_logits_the_first_is_chosen(isa):
    check_first_choices()


def test_scratch_does_not_grow_with_the_vocabulary():
    """The peak of a process stays far below the 100 MB of whole logits."""
    script = """
import resource, torch
from distaya_ext.ops.influence import divergence
torch.set_num_threads(1)
P, W = torch.ones(100, 16), torch.ones(250000, 16, dtype=torch.float16)
divergence(P[:1], P[:1], W[:900], torch.tensor([0]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
divergence(P, P, W, torch.zeros(100, dtype=torch.int64))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 20_000  # kB


# ---- bad input ----


def refuses(match, call, *args, error=ValueError, **kwargs):
    with pytest.raises(error, match=match):
        call(*args, **kwargs)


def test_bad_rows_are_refused_in_a_sentence():
    X = randn(4, 8)
    refuses(r"Y \[4, 7\] does not have the shape of X", similarity, X, X[:, :7], error=InputError)
    refuses("must be one of float32", similarity, X.double(), X.double())
    refuses("a run of 4 layers", room.similarity_runs, X[:, None], 4, error=InputError)
    refuses("a run of 0 layers", room.similarity_runs, X[:, None], 0, error=InputError)


def test_bad_heads_are_refused_in_a_sentence():
    (P, Q, W, t), _ = head(2, 4, 8, 30)
    refuses("P must have 2 dimensions", divergence, P[0], Q, W, t)
    refuses(r"Q \[8\] must be", divergence, P, P[0], W, t, error=InputError)
    refuses("Q .* must hold matrices of the shape of P", divergence, P, Q[:, :3], W, t)
    refuses("W has 7 columns but P has 8", divergence, P, Q, W[:, :7].contiguous(), t)
    refuses("W .* is not contiguous", divergence, P, Q, W.t().contiguous().t(), t)
    refuses("W .* has no entries", divergence, P, Q, W[:0], t)
    refuses("W is float64", divergence, P, Q, W.double(), t)
    refuses("targets .* must be one per token", divergence, P, Q, W, t[:3])
    refuses("targets must be int64", divergence, P, Q, W, t.int())
    bad = torch.tensor([0, 30, 0, 0])
    refuses(r"targets\[1\] is 30 but the vocabulary has 30", divergence, P, Q, W, bad)
    refuses(r"targets\[0\] is -100", divergence, P, Q, W, t.clone().fill_(-100))
    refuses("bias .* one entry per row of W", divergence, P, Q, W, t, bias=torch.zeros(8))
    refuses("scale is nan", divergence, P, Q, W, t, scale=math.nan)
    refuses("scale is 1e\\+300 but must be finite in float32", divergence, P, Q, W, t, scale=1e300)
    for cap in (0.0, -3.0, math.inf, math.nan, 1e-60):
        refuses("cap is .* above 0", divergence, P, Q, W, t, cap=cap)


def test_nothing_to_compare():
    (P, Q, W, t), _ = head(2, 4, 8, 30)
    assert divergence(P[:0], Q[:, :0], W, t[:0]).shape == (2, 0, 4)
    assert divergence(P, Q[:0], W, t).shape == (0, 4, 4)


def test_opcheck_and_compile():
    (P, Q, W, t), _ = head(2, 4, 8, 30)
    torch.library.opcheck(room.influence_similarity, (P, Q[0]))
    torch.library.opcheck(room.influence_divergence, (P, Q, W, t, 0.5, 30.0, torch.zeros(30)))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(P, Q):
        return similarity(P, Q[0]), divergence(P, Q, W, t, cap=5.0)

    for found, plain in zip(both(P, Q), (similarity(P, Q[0]), divergence(P, Q, W, t, cap=5.0)),
                            strict=True):  # fmt: skip
        assert torch.equal(found, plain)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_twin(dtype):
    """Within twice the bounds of the CPU's results, the same bits again."""
    for options in HEADS.values():
        operands, rest = head(3, 300, 520, 9000, dtype=dtype, **options)
        moved = [x.cuda() for x in operands]
        there = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in rest.items()}
        found = divergence(*moved, **there)
        assert torch.equal(found, divergence(*moved, **there))
        ours = divergence(*operands, **rest)
        of_kl, of_nll, _ = allowed(*operands[:3], terms(520), **rest)
        assert bool(((found.cpu() - ours)[..., 0].abs() <= 2 * of_kl).all())
        off = (found.cpu() - ours)[..., 1:3].abs() - 2 * U * ours[..., 1:3]
        assert bool((off <= 2 * of_nll[..., None]).all())
    P, Q = operands[0], operands[1][0]
    torch.testing.assert_close(similarity(P.cuda(), Q.cuda()).cpu(), similarity(P, Q))
