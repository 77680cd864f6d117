"""Similarity and divergence at Aya-8B's head, next to plain torch with whole logits and in chunks.

The hidden size is 4096; the vocabulary is cut from 256000 to 32768 entries, because whole logits
of the former and their softmax take gigabytes (time grows in proportion to it). Gflop/s counts
the product of the head alone, per second of the median, beside the measured one-thread peak;
`times ours` is the median of each ruler's seconds over ours, from runs in turn. For one thread:
OMP_NUM_THREADS=1.
"""

import pytest
import torch

from bench import compared, shapes
from bench.harness import Contender, compare
from distaya_ext.ops import influence, machine

HIDDEN, VOCABULARY, TOKENS, SCALE = 4096, 32768, 256, 2.0
VARIANTS = [1, 8]  # Qs beside one P
STATES = [2048, 8192]  # tokens
DTYPES = [torch.float32, torch.bfloat16]  # of what is compared


def head(variants: int, dtype: torch.dtype):
    """P, Q, W, targets: hidden states after the last norm, and the head's weights in bf16."""
    P = shapes.activations(TOKENS, HIDDEN).float()
    P /= P.square().mean(-1, keepdim=True).sqrt()
    noise = shapes.activations(variants * TOKENS, HIDDEN, seed=3).float()
    Q = P + 0.5 * noise.view(variants, TOKENS, HIDDEN)
    W = shapes.weights(VOCABULARY, HIDDEN).bfloat16()
    return P.to(dtype), Q.to(dtype), W, torch.arange(TOKENS) * 101 % VOCABULARY


def note(benchmark, ways: dict, limit: float, flop: float = 0.0, runs: int = 5) -> None:
    """Times every way in turn; ours is the benchmark's own row."""
    results: dict[str, list] = {}
    threads = torch.get_num_threads()
    times = compare([Contender(n, w, runs=runs) for n, w in ways.items()], threads, results=results)
    assert compared.off(results["ours"][0], results["torch, fp32"][0]) <= limit
    benchmark.pedantic(ways["ours"], rounds=1)
    extra = benchmark.extra_info
    extra["seconds"] = {name: round(t.wall, 5) for name, t in times.items()}
    extra["times ours"] = {n: round(t.wall / times["ours"].wall, 2) for n, t in times.items()}
    extra["threads"] = machine.threads()
    if flop:
        extra["gflops"] = round(flop / times["ours"].wall * 1e-9, 1)
        extra["peak_one_thread"] = round(machine.peak()["fp32"], 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variants", VARIANTS)
def test_divergence(benchmark, variants, dtype):
    """Torch's logits in fp32, as ours are, and as a bf16 head has them (two digits of KL)."""
    operands = head(variants, dtype)
    full, half = torch.float32, torch.bfloat16
    ways = {
        "ours": lambda: influence.divergence(*operands, scale=SCALE),
        "torch, fp32": lambda: compared.whole_logits(*operands, SCALE, full),
        "torch, fp32 in chunks": lambda: compared.chunked_logits(*operands, SCALE, full),
        "torch, bf16": lambda: compared.whole_logits(*operands, SCALE, half),
        "torch, bf16 in chunks": lambda: compared.chunked_logits(*operands, SCALE, half),
    }
    flop = 2.0 * (1 + variants) * TOKENS * VOCABULARY * HIDDEN
    note(benchmark, ways, 1e-3, flop, runs=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", STATES)
def test_similarity(benchmark, tokens, dtype):
    """Two hidden states of one layer."""
    X = shapes.activations(tokens, HIDDEN).to(dtype)
    Y = (X + 0.1 * shapes.activations(tokens, HIDDEN, seed=3)).to(dtype)
    ways = {
        "ours": lambda: influence.similarity(X, Y),
        "torch, fp32": lambda: compared.similarity(X, Y),
    }
    note(benchmark, ways, 1e-3)
    seconds = benchmark.extra_info["seconds"]["ours"]
    benchmark.extra_info["GB/s"] = round((X.nbytes + Y.nbytes) / seconds * 1e-9, 1)
