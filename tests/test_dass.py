"""DaSS against slow literal code: masks of both directions, moments, the order of the neurons."""

import math

import pytest
import torch
from torch import nn

from distaya_ext.ops import dass, machine
from distaya_ext.ops import mask as M

U = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTS = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda g: nn.functional.gelu(g, approximate="tanh"),
}
PATTERNS = [{"nm": (2, 4)}, {"nm": (4, 8)}, {"nm": (1, 4)}, {"sparsity": 0.5}, {"sparsity": 0.3}]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def glu(act, neurons=48, columns=40, outputs=24, dtype=torch.float32, seed=0):
    """gate, up, down of a random gated MLP and the root mean square of each input of down."""
    gate = randn(neurons, columns, seed=seed) * (1 + randn(neurons, 1, seed=seed + 1).abs())
    up, down = randn(neurons, columns, seed=seed + 2), randn(outputs, neurons, seed=seed + 3)
    x = randn(200, columns, seed=seed + 4)
    gate, up, down = gate.to(dtype), up.to(dtype), down.to(dtype)
    a = ACTS[act](x @ gate.float().t()) * (x @ up.float().t())
    return gate, up, down, a.square().mean(0).sqrt()


def literal_group(scores, places, kept):
    """Of the places (row, column) of one group, the `kept` best; of equal ones the earlier."""
    ranked = sorted(places, key=lambda at: (-scores[at[0]][at[1]], places.index(at)))
    return set(ranked[:kept])


def literal_masks(gate, up, down, a_norm, alpha, direction, sparsity=None, nm=None):
    """DaSS as the paper puts it, one group after the other."""
    neurons, columns = gate.shape
    result = []
    for W in (gate, up):
        S = [
            [float(torch.tensor(abs(w) * float(r) ** alpha, dtype=torch.float32)) for w in row]
            for row, r in zip(W.double().tolist(), a_norm.double().tolist(), strict=True)
        ]
        if direction == "outputs":
            lines = [[(i, j) for i in range(neurons)] for j in range(columns)]
        else:
            lines = [[(i, j) for j in range(columns)] for i in range(neurons)]
        result.append(literal_mask(W.shape, S, lines, sparsity, nm))
    S = (down.float().abs() * a_norm).tolist()
    lines = [[(i, j) for j in range(neurons)] for i in range(len(down))]
    return [*result, literal_mask(down.shape, S, lines, sparsity, nm)]


def literal_mask(shape, S, lines, sparsity, nm):
    mask = torch.zeros(shape, dtype=torch.bool)
    for line in lines:
        if nm is None:
            groups, kept = [line], len(line) - math.floor(len(line) * sparsity)
        else:
            groups = [line[k : k + nm[1]] for k in range(0, len(line), nm[1])]
            kept = nm[0]
        for group in groups:
            for i, j in literal_group(S, group, kept):
                mask[i, j] = True
    return mask


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("direction", dass.DIRECTIONS)
@pytest.mark.parametrize("act", ACTS)
def test_masks_are_those_of_literal_code(act, direction, pattern, isa):
    gate, up, down, norm = glu(act)
    found = dass.masks(gate, up, down, norm, direction=direction, **pattern)
    expected = literal_masks(gate, up, down, norm, 0.5, direction, **pattern)
    for name, mask, slow in zip(("gate", "up", "down"), found, expected, strict=True):
        assert torch.equal(mask, slow), name


@pytest.mark.parametrize("direction", dass.DIRECTIONS)
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_masks_of_other_powers_and_dtypes(dtype, alpha, direction):
    """16-bit weights of small whole numbers: most scores are tied with another."""
    gate, up, down, norm = glu("silu", dtype=dtype)
    gate, up, down = (W.round() for W in (gate, up, down))
    norm = (2 * norm).round() / 2
    for pattern in PATTERNS:
        found = dass.masks(gate, up, down, norm, direction=direction, alpha=alpha, **pattern)
        expected = literal_masks(gate, up, down, norm, alpha, direction, **pattern)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), pattern


@pytest.mark.parametrize("nm", [(2, 4), (4, 8), (3, 6)])
def test_patterns_have_exact_counts(nm):
    gate, up, down, norm = glu("gelu", neurons=96, columns=48)
    n, m = nm
    for direction in dass.DIRECTIONS:
        masks = dass.masks(gate, up, down, norm, nm=nm, direction=direction)
        for mask in masks[:2]:
            lines = mask.t() if direction == "outputs" else mask
            assert bool((lines.reshape(len(lines), -1, m).sum(2) == n).all())
        assert bool((masks.down.view(24, -1, m).sum(2) == n).all())
    for s in (0.0, 0.29, 0.5, 0.9):
        masks = dass.masks(gate, up, down, norm, sparsity=s)
        assert bool(((~masks.gate).sum(0) == int(96 * s)).all())
        assert bool(((~masks.up).sum(0) == int(96 * s)).all())
        assert bool(((~masks.down).sum(1) == int(96 * s)).all())


def test_along_inputs_the_activations_do_not_matter():
    gate, up, down, norm = glu("silu")
    masks = dass.masks(gate, up, down, norm, nm=(2, 4), direction="inputs")
    assert torch.equal(masks.gate, M.keep_nm(M.magnitude(gate), 2, 4))
    assert torch.equal(masks.down, M.keep_nm(M.wanda(down, norm), 2, 4))
    outputs = dass.masks(gate, up, down, norm, nm=(2, 4))
    assert not torch.equal(outputs.gate, M.keep_nm(M.magnitude(gate), 2, 4, "outputs"))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 0.3, 2.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_are_rounded_once(dtype, power, isa):
    for shape in ((1, 1), (3, 17), (40, 64), (33, 129)):
        W, norm = randn(*shape).to(dtype), randn(shape[0], seed=1).abs()
        norm[0] = 0
        S = W.double().abs() * norm.double()[:, None] ** power
        found = dass.gate_up(W, norm, power).double()
        assert bool(((found - S).abs() <= 1.0001 * U * S).all())
        if power in (0.0, 0.5, 1.0):
            assert torch.equal(found, S.float().double())


def exact_moments(gate, up, act):
    """The three sums in fp64, the slope by torch's own gradient."""
    g, u = gate.double().requires_grad_(), up.double()
    value = ACTS[act](g)
    (slope,) = torch.autograd.grad(value.sum(), g)
    value = value.detach()
    return torch.stack([(value * u).square(), value.square(), (slope * u).square()])


def bounds(gate, up, runs_of=64):
    """dass.h's bounds on the three sums, before the sum over tokens."""
    g, u = gate.double().abs(), up.double()
    first = (20 + runs_of + 8) * U
    return torch.stack(
        [first * (g * u) ** 2, first * g**2, (72 + runs_of + 8) * U * ((1 + g) * u) ** 2]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_moments_within_their_bound(act, dtype, isa, threads):
    for tokens, neurons in ((1, 1), (5, 37), (64, 16), (300, 533)):
        gate = (3 * randn(tokens, neurons)).to(dtype)
        up = randn(tokens, neurons, seed=1).to(dtype)
        weights = (randn(tokens, seed=2).abs() * 3).round()
        for w in (None, weights):
            s = torch.rand(3, neurons, dtype=torch.float64)
            before, factor = s.clone(), torch.ones(tokens) if w is None else w
            dass.moments_(s, gate, up, act, w)
            exact = (exact_moments(gate, up, act) * factor[:, None]).sum(1)
            allowed = (bounds(gate, up) * factor[:, None]).sum(1)
            assert bool(((s - before - exact).abs() <= allowed + 1e-14 * s).all())


@pytest.mark.parametrize("act", ACTS)
def test_moments_of_large_and_odd_gates(act, isa):
    """No overflow on the way, no NaN that was not there; tokens of weight 0 may hold anything."""
    gate = torch.tensor([[-300.0, 300.0, -90.0, 88.0, -9.5, 9.5, 0.0, -0.0, 13.0, -13.0, 4.1]])
    up = torch.full_like(gate, 1.5)
    s = torch.zeros(3, gate.shape[1], dtype=torch.float64)
    dass.moments_(s, gate, up, act)
    exact = exact_moments(gate, up, act).sum(1)
    assert bool(((s - exact).abs() <= bounds(gate, up).sum(1) + 1e-300).all())
    bad = torch.full((2, 11), math.nan)
    dass.moments_(s, bad, bad, act, torch.zeros(2))
    assert bool(s.isfinite().all())
    dass.moments_(s, bad[:1], up, act)
    assert bool(s.isnan().all())


def test_moments_are_the_same_for_any_number_of_threads():
    gate, up = randn(1000, 700).bfloat16(), randn(1000, 700, seed=1).bfloat16()
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            s = torch.zeros(3, 700, dtype=torch.float64)
            dass.moments_(s, gate, up, "silu")
            found.append(s)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


def test_worth_is_the_first_order_loss():
    """The mean squared change of y when weights at one neuron are hit by independent noise."""
    gate, up, down, _ = glu("silu", 12, 10, 8)
    x = randn(4000, 10, seed=9)
    g, u = x @ gate.t(), x @ up.t()
    s = torch.zeros(3, 12, dtype=torch.float64)
    dass.moments_(s, g, u, "silu")
    worth = dass.neuron_scores(gate, up, down, s / len(x), x.square().mean(0).sqrt())
    slope = exact_moments(g, torch.ones_like(u), "silu")[2].sqrt()
    a = nn.functional.silu(g) * u
    energy = (a.square() + ((slope * u).square() * (x.square() @ gate.t().square()))).mean(0)
    energy = energy + (nn.functional.silu(g).square() * (x.square() @ up.t().square())).mean(0)
    direct = down.double().square().sum(0) * energy
    # E[s^2 x^2] against E[s^2] E[x^2]: the same to first order, not the same number
    assert bool((worth / direct - 1).abs().max() < 0.6)
    scaled = dass.neuron_scores(gate, 8 * up, down / 8, s, torch.ones(10))
    factors = torch.tensor([64.0, 1.0, 64.0], dtype=torch.float64)[:, None]
    moved = dass.neuron_scores(gate, 8 * up, down / 8, s * factors, torch.ones(10))
    torch.testing.assert_close(moved, dass.neuron_scores(gate, up, down, s, torch.ones(10)))
    assert not torch.equal(scaled, moved)


# ---- the order of the neurons ----


def uneven(neurons, features, seed=0):
    """Scores of neurons that differ by orders of magnitude and stand sorted, so unbalanced."""
    scale = torch.linspace(0, 4, neurons).exp()[:, None]
    return randn(neurons, features, seed=seed).abs() * scale


def literal_mass(scores, order, nm):
    """What N:M prunes along the order, group by group."""
    n, m = nm
    total = 0.0
    for k in range(0, len(order), m):
        for f in range(scores.shape[1]):
            total += sum(sorted(float(scores[i, f]) for i in order[k : k + m])[: m - n])
    return total


@pytest.mark.parametrize("nm", [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (6, 8), (2, 6)])
def test_balance_prunes_less(nm, isa):
    m = nm[1]
    scores = uneven(6 * m, 37)
    order = dass.balance(scores, nm)
    assert torch.equal(order.sort().values, torch.arange(6 * m))
    here = torch.arange(6 * m)
    before, dealt = (
        literal_mass(scores, o.tolist(), nm) for o in (here, dass._deal(scores.sum(1), m))
    )
    after = literal_mass(scores, order.tolist(), nm)
    assert float(dass.pruned_mass(scores, order, nm)) == pytest.approx(after, rel=1e-6)
    assert after < 0.9 * before
    assert after < dealt if m in (2, 4, 8) else after == pytest.approx(dealt)


@pytest.mark.parametrize("groups", [1, 2, 5, 6])
def test_no_exchange_is_left(groups):
    """After enough rounds no two neurons of any two groups can change places for the better."""
    scores, nm = uneven(4 * groups, 40, seed=groups), (2, 4)
    order = dass.balance(scores, nm, rounds=200)
    mass = float(dass.pruned_mass(scores, order, nm))
    for i in range(4 * groups):
        for k in range(4 * (i // 4) + 4, 4 * groups):
            other = order.clone()
            other[[i, k]] = order[[k, i]]
            assert float(dass.pruned_mass(scores, other, nm)) > (1 - 2.0**-11) * mass, (i, k)


def test_balance_never_prunes_more():
    for seed in range(6):
        scores = randn(32, 50, seed=seed).abs()
        order = dass.balance(scores, (2, 4), rounds=0)
        here = torch.arange(32)
        assert dass.pruned_mass(scores, order, (2, 4)) <= dass.pruned_mass(scores, here, (2, 4))


def test_balance_is_the_same_everywhere(isa, threads):
    scores = uneven(200, 333, seed=3)
    order = dass.balance(scores, (2, 4))
    assert torch.equal(order, dass.balance(scores, (2, 4)))
    with machine.use_isa("portable"):
        assert torch.equal(order, dass.balance(scores, (2, 4)))


def test_the_dense_neurons_come_last():
    worth = torch.tensor([1.0, 9.0, 3.0, 8.0, 3.0, 0.0, 3.0, 2.0])
    assert dass.arrange(worth, 0).tolist() == list(range(8))
    assert dass.arrange(worth, 2).tolist() == [0, 2, 4, 5, 6, 7, 1, 3]
    assert dass.arrange(worth, 4).tolist() == [0, 5, 6, 7, 1, 2, 3, 4]  # of equal ones the first
    assert dass.arrange(worth, 8).tolist() == list(range(8))
    order = dass.arrange(worth, 4, uneven(8, 5), (1, 2))
    assert order[4:].tolist() == [1, 2, 3, 4] and sorted(order[:4].tolist()) == [0, 5, 6, 7]


# ---- bad input ----


def refuses(match, call, *args, **kwargs):
    with pytest.raises(ValueError, match=match):
        call(*args, **kwargs)


def test_bad_input_is_refused_in_a_sentence():
    gate, up, down, norm = glu("silu")
    masks = dass.masks
    refuses(r"2:5 along the outputs needs a multiple of 5 but there are 48", masks, gate, up, down,
            norm, nm=(2, 5))  # fmt: skip
    refuses(r"3:7 along the inputs needs a multiple of 7 but there are 40", masks, gate, up, down,
            norm, nm=(3, 7), direction="inputs")  # fmt: skip
    refuses(r"direction is 'rows'", masks, gate, up, down, norm, nm=(2, 4), direction="rows")
    refuses("one of them", masks, gate, up, down, norm)
    refuses("one of them", masks, gate, up, down, norm, nm=(2, 4), sparsity=0.5)
    refuses(r"sparsity 1.0 is outside \[0, 1\)", masks, gate, up, down, norm, sparsity=1.0)
    refuses("not of one gated MLP", masks, gate, up[:, :9], down, norm, nm=(2, 4))
    refuses("not of one gated MLP", masks, gate, up, down.t(), norm, nm=(2, 4))
    refuses("not of one gated MLP", masks, gate, up, down, norm[:5], nm=(2, 4))
    refuses("norms has 5 entries but W has 48 rows", dass.gate_up, gate, norm[:5])
    refuses(r"power is -1 but must be finite and not negative", dass.gate_up, gate, norm, -1.0)
    refuses("norms must be float32", dass.gate_up, gate, norm.double())
    refuses("not contiguous", dass.gate_up, gate.t(), norm[:40])
    spoilt = norm.clone()
    spoilt[3] = math.nan
    refuses("is NaN at row 3, column 0", masks, gate, up, down, spoilt, nm=(2, 4))


def test_bad_moments_and_orders_are_refused():
    s, g = torch.zeros(3, 7, dtype=torch.float64), torch.zeros(5, 7)
    refuses("the activation 'relu' must be", dass.moments_, s, g, g, "relu")
    refuses(
        "up .* must have the shape and dtype of gate", dass.moments_, s, g, g.bfloat16(), "silu"
    )
    refuses(r"must be \[3, 7\]", dass.moments_, s[:2], g, g, "silu")
    refuses("s must be float64", dass.moments_, s.float(), g, g, "silu")
    refuses("weights has 4 entries but gate has 5 tokens", dass.moments_, s, g, g, "silu",
            torch.ones(4))  # fmt: skip
    refuses(r"weights\[1\] is -2", dass.moments_, s, g, g, "silu",
            torch.tensor([1.0, -2, 1, 1, 1]))  # fmt: skip
    scores = torch.rand(8, 5)
    refuses("7 neurons are no whole number of groups of 4", dass.balance, scores[:7], (2, 4))
    refuses(r"order\[2\] is 8 but scores has 8 rows", dass.dass_balance_,
            torch.tensor([0, 1, 8, 3]), scores, 1, 2, 3)  # fmt: skip
    refuses("groups of 6 cannot be balanced", dass.dass_balance_, torch.arange(6), scores, 2, 6, 3)
    refuses("1 <= N < M", dass.dass_balance_, torch.arange(8), scores, 4, 4, 3)
    refuses("rounds is -1", dass.dass_balance_, torch.arange(8), scores, 2, 4, -1)
    refuses("9 of 8 neurons cannot stay dense", dass.arrange, torch.rand(8), 9)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)], ids=str)
def test_empty_matrices(shape):
    W = torch.empty(shape)
    assert dass.gate_up(W, torch.ones(shape[0])).shape == shape
    s = torch.zeros(3, shape[1], dtype=torch.float64)
    dass.moments_(s, W, W, "silu")
    assert not s.any()


def test_ops_are_ops():
    torch.library.opcheck(dass.dass_score, (randn(5, 7), torch.ones(5), 0.5))
    s = torch.zeros(3, 7, dtype=torch.float64)
    torch.library.opcheck(dass.dass_moments_, (s, randn(5, 7), randn(5, 7), "silu", None))
    torch.library.opcheck(dass.dass_balance_, (torch.arange(8), torch.rand(8, 5), 2, 4, 3))


def test_the_order_does_not_depend_on_the_number_of_threads():
    """Sums longer than what torch leaves to one thread."""
    scores, found, before = uneven(256, 600, seed=5), [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            order = dass.balance(scores, (2, 4), rounds=5)
            found.append((order, dass.pruned_mass(scores, order, (2, 4)), dass.total_of(scores)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_some_of_the_neurons_are_balanced():
    scores = uneven(40, 30, seed=2)
    among = torch.arange(40)[torch.arange(40) % 5 != 0]
    order = dass.balance(scores, (2, 4), among=among)
    assert torch.equal(order.sort().values, among)
    assert torch.equal(order, among[dass.balance(scores[among].contiguous(), (2, 4))])
