"""What bench/gpu.py times of the room influence: hidden states compared, and a whole head."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench import compared, shapes
from bench.gpu_case import Case, Size, rotated

VOCABULARY, WIDTH = 256000, 4096  # Aya-8B's; smaller sizes keep the proportion
TOKENS, VARIANTS, SCALE = 1024, 3, 2.0  # a Q for each layer left out


def similarity(s: Size) -> Case:
    from distaya_ext.ops import influence

    X = shapes.activations(s.tokens, s.hidden, device=s.device)
    Y = X + 0.1 * shapes.activations(s.tokens, s.hidden, seed=3, device=s.device)
    return Case(
        influence.similarity,
        {"torch": compared.similarity},
        rotated(X, Y),
        {"copy": (X.nbytes + Y.nbytes) / 1e9},
        compared.off,
        limit=1e-3,
    )


def vocabulary(s: Size) -> int:
    return VOCABULARY * s.hidden // WIDTH


def divergence(s: Size) -> Case:
    """One P beside several Qs. The ruler in bf16 rounds logits to three digits."""
    from distaya_ext.ops import influence

    tokens = min(TOKENS, s.tokens)
    states = shapes.activations((1 + VARIANTS) * tokens, s.hidden, device=s.device).float()
    states /= states.square().mean(-1, keepdim=True).sqrt()
    first, others = states[:tokens], states[tokens:].view(VARIANTS, tokens, s.hidden)
    P, Q = first.bfloat16(), (first + 0.5 * others).bfloat16()
    W = shapes.weights(vocabulary(s), s.hidden, device=s.device).bfloat16()
    targets = torch.arange(tokens, device=s.device) * 101 % len(W)
    full, half = torch.float32, torch.bfloat16
    return Case(
        lambda *operands: influence.divergence(*operands, scale=SCALE),
        {
            "torch in chunks, fp32": lambda *x: compared.chunked_logits(*x, SCALE, full),
            "torch in chunks, bf16": lambda *x: compared.chunked_logits(*x, SCALE, half),
            "torch, whole bf16": lambda *x: compared.whole_logits(*x, SCALE, half),
        },
        rotated(P, Q, W, targets),
        {
            "fp32": 2 * (1 + VARIANTS) * tokens * W.numel() / 1e9,
            "copy": (P.nbytes + Q.nbytes + W.nbytes) / 1e9,
        },
        compared.off,
        limit=2e-3,
    )


def cases(s: Size) -> dict[str, Callable[[], Case]]:
    size = f"{vocabulary(s)}x{s.hidden} bf16, {VARIANTS} x {min(TOKENS, s.tokens)}"
    return {
        f"similarity {s.tokens} x {s.hidden} bf16": lambda: similarity(s),
        f"divergence {size}": lambda: divergence(s),
    }
