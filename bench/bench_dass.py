"""DaSS at the shapes of Aya-8B's MLP (4096 to 14336), next to torch's own way.

Scores are memory-bound: `GB/s` is bytes read and written once over the fastest round. Moments are
bound by the exponential: `Gtokens*neurons/s`. For one thread: OMP_NUM_THREADS=1.
"""

import pytest
import torch
from torch.nn.functional import gelu, silu

from distaya_ext.ops import dass, machine

HIDDEN, FF, TOKENS = 4096, 14336, 512
ROUNDS = {"rounds": 3, "warmup_rounds": 1}
ACTS = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": lambda g: gelu(g, approximate="tanh"),
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def note(benchmark, work: float, unit: str) -> None:
    """Work per second, and what it was measured on."""
    benchmark.extra_info[unit] = round(work / benchmark.stats.stats.min * 1e-9, 2)
    benchmark.extra_info["threads"] = machine.threads()


@pytest.fixture(scope="module")
def W():
    return random(FF, HIDDEN).bfloat16()


@pytest.fixture(scope="module")
def norms():
    return random(FF, seed=1).abs() + 0.1


def test_score(benchmark, W, norms):
    """bf16 weights of gate to fp32 scores."""
    benchmark.pedantic(dass.gate_up, args=(W, norms), **ROUNDS)
    note(benchmark, W.numel() * 6, "GB/s")


def test_ruler_score(benchmark, W, norms):
    """The same in torch."""
    benchmark.pedantic(lambda: W.abs().float() * norms.sqrt()[:, None], **ROUNDS)
    note(benchmark, W.numel() * 6, "GB/s")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_moments(benchmark, act, dtype):
    """All three sums, of which nothing is stored on the way."""
    gate, up = random(TOKENS, FF).to(dtype), random(TOKENS, FF, seed=1).to(dtype)
    s = torch.zeros(3, FF, dtype=torch.float64)
    benchmark.pedantic(dass.moments_, args=(s, gate, up, act), **ROUNDS)
    note(benchmark, TOKENS * FF, "Gtokens*neurons/s")


@pytest.mark.parametrize("act", ACTS)
def test_ruler_moments(benchmark, act):
    """The first of the three sums in torch, which is what DaSS itself needs."""
    gate, up = random(TOKENS, FF).bfloat16(), random(TOKENS, FF, seed=1).bfloat16()
    s = torch.zeros(FF, dtype=torch.float64)
    benchmark.pedantic(
        lambda: s.add_((ACTS[act](gate.float()) * up.float()).square().sum(0)), **ROUNDS
    )
    note(benchmark, TOKENS * FF, "Gtokens*neurons/s")


@pytest.mark.parametrize("nm", [(2, 4), (4, 8)], ids="{0[0]}:{0[1]}".format)
def test_balance_round(benchmark, norms, nm):
    """One round of exchanges between all groups of down's columns."""
    scores = random(FF, HIDDEN).abs().mul_(norms[:, None])
    order = torch.arange(FF)
    benchmark.pedantic(dass.dass_balance_, args=(order, scores, *nm, 1), **ROUNDS)
    note(benchmark, scores.numel() * 4, "GB/s")
