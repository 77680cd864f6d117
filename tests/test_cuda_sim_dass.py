"""Every CUDA kernel of the dass room, in the simulator: the CPU's results, under every schedule."""

import pytest
import torch

from distaya_ext.ops import dass

U = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (70, 1), (19, 257)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores(simulator, dtype, shape):
    W, norm = randn(*shape).to(dtype), randn(shape[0], seed=1).abs()
    for power in (0.0, 0.5, 1.0):
        found = simulator.same_always(lambda p=power: dass.gate_up(W, norm, p))
        assert torch.equal(found, dass.gate_up(W, norm, power)), power
    found, ours = (
        simulator.same_always(lambda: dass.gate_up(W, norm, 0.3)),
        dass.gate_up(W, norm, 0.3),
    )
    assert bool(((found - ours).abs() <= 2.0002 * U * ours).all())


@pytest.mark.parametrize("act", dass.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments(simulator, dtype, act):
    for tokens, neurons in ((1, 1), (23, 70), (521, 33)):  # more tokens than 8 runs of 64
        gate, up = (3 * randn(tokens, neurons)).to(dtype), randn(tokens, neurons, seed=1).to(dtype)
        weights = (2 * randn(tokens, seed=2).abs()).round()
        for w in (None, weights):

            def run(gate=gate, up=up, w=w):
                s = torch.ones(3, gate.shape[1], dtype=torch.float64)
                dass.moments_(s, gate, up, act, w)
                return s

            ours, factor = run(), torch.ones(tokens) if w is None else w
            found = simulator.same_always(run)
            g, u = gate.double().abs(), up.double()
            terms = torch.stack([92 * (g * u) ** 2, 92 * g**2, 144 * ((1 + g) * u) ** 2])
            allowed = 2 * U * (terms * factor[:, None]).sum(1)  # dass.h's bound, on either side
            assert bool(((found - ours).abs() <= allowed + 1e-13).all())


def test_a_token_of_weight_0_may_hold_anything(simulator):
    gate = torch.full((9, 5), torch.nan)
    gate[4] = 2

    def run():
        s = torch.zeros(3, 5, dtype=torch.float64)
        dass.moments_(s, gate, gate, "silu", (torch.arange(9) == 4).float())
        return s

    torch.testing.assert_close(simulator.same_always(run), run(), rtol=1e-5, atol=0)
    assert bool(run().isfinite().all())


@pytest.mark.parametrize("m", [2, 4, 8])
@pytest.mark.parametrize("groups", [2, 3, 6])
def test_balance_takes_the_same_decisions(simulator, m, groups):
    scale = torch.linspace(0, 4, groups * m + 2).exp()[:, None]
    for n in sorted({1, m // 2, m - 1}):
        for features in (1, 45, 96):
            scores = randn(groups * m + 2, features, seed=n).abs() * scale

            def run(scores=scores, n=n):
                order = torch.arange(2, groups * m + 2)
                dass.dass_balance_(order, scores, n, m, 5)
                return order

            assert torch.equal(simulator.same_always(run), run()), (n, features)
            assert not torch.equal(run(), torch.arange(2, groups * m + 2)) or features == 1


@pytest.mark.parametrize("direction", dass.DIRECTIONS)
def test_masks_and_order_of_an_mlp(simulator, direction):
    gate, up, down = (
        randn(24, 20).bfloat16(),
        randn(24, 20, seed=1).bfloat16(),
        randn(12, 24, seed=2),
    )
    norm = randn(24, seed=3).abs()
    for pattern in ({"nm": (2, 4)}, {"sparsity": 0.5}):

        def run(pattern=pattern):
            return tuple(dass.masks(gate, up, down, norm, direction=direction, **pattern))

        for found, ours in zip(simulator.same_always(run), run(), strict=True):
            assert torch.equal(found, ours)
    moments, x_norm = torch.rand(3, 24, dtype=torch.float64), torch.ones(20)
    worth = dass.neuron_scores(gate, up, down, moments, x_norm)
    with simulator.use():
        found = dass.neuron_scores(gate, up, down, moments, x_norm)
    torch.testing.assert_close(found, worth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)], ids=str)
def test_empty_matrices(simulator, shape):
    with simulator.use():
        W = torch.empty(shape)
        assert dass.gate_up(W, torch.ones(shape[0])).shape == shape
        dass.moments_(torch.zeros(3, shape[1], dtype=torch.float64), W, W, "gelu")
