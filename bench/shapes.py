"""The inputs the speed benches share: Aya-8B's matrix shapes, activations, weights, Hessians."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """One decoder layer of Cohere's shape: (name, rows, columns) of each Linear, by input."""

    hidden: int
    ff: int
    kv: int

    @property
    def stages(self) -> tuple[tuple[tuple[str, int, int], ...], ...]:
        d, ff, kv = self.hidden, self.ff, self.kv
        parallel = (("q", d, d), ("k", kv, d), ("v", kv, d), ("gate", ff, d), ("up", ff, d))
        return parallel, (("o", d, d),), (("down", d, ff),)


AYA_8B = Layer(hidden=4096, ff=14336, kv=1024)  # Aya-23-8B, Aya-Expanse-8B
SMALL = Layer(hidden=256, ff=896, kv=64)  # the same proportions, for smoke tests


def activations(tokens: int, columns: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """X [tokens, columns] bf16: correlated, power-law spectrum, a few outlier channels."""
    random = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    rank = max(8, columns // 16)
    decay = torch.arange(1, rank + 1, device=device).float().pow(-0.5)
    mix = torch.randn(rank, columns, **random) * decay[:, None]
    X = torch.randn(tokens, rank, **random) @ mix
    X += 0.5 * torch.randn(tokens, columns, **random)
    scale = torch.exp(0.4 * torch.randn(columns, **random))
    scale[torch.randperm(columns, **random)[: max(1, columns // 500)]] *= 12
    return (X * scale).to(torch.bfloat16)


def weights(rows: int, columns: int, seed: int = 1, device: str = "cpu") -> Tensor:
    """W [rows, columns] fp32 with tails heavier than a Gaussian's (kurtosis about 8)."""
    random = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    W = torch.randn(rows, columns, **random)
    return W.mul_(torch.exp(0.5 * torch.randn(rows, columns, **random))).mul_(0.02)


def hessian(columns: int, tokens: int, seed: int = 2, device: str = "cpu") -> Tensor:
    """H [columns, columns] fp32 = 2/tokens X^T X, symmetric, of such activations."""
    X = activations(tokens, columns, seed, device).float()
    return (X.t() @ X).mul_(2 / tokens)
