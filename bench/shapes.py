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


def activations(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """X [tokens, columns] bf16: correlated, power-law spectrum, a few outlier channels."""
    make = torch.Generator().manual_seed(seed)
    rank = max(8, columns // 16)
    decay = torch.arange(1, rank + 1).float().pow(-0.5)
    mix = torch.randn(rank, columns, generator=make) * decay[:, None]
    X = torch.randn(tokens, rank, generator=make) @ mix
    X += 0.5 * torch.randn(tokens, columns, generator=make)
    scale = torch.exp(0.4 * torch.randn(columns, generator=make))
    scale[torch.randperm(columns, generator=make)[: max(1, columns // 500)]] *= 12
    return (X * scale).to(torch.bfloat16)


def weights(rows: int, columns: int, seed: int = 1) -> Tensor:
    """W [rows, columns] fp32 with tails heavier than a Gaussian's (kurtosis about 8)."""
    make = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=make)
    return W.mul_(torch.exp(0.5 * torch.randn(rows, columns, generator=make))).mul_(0.02)


def hessian(columns: int, tokens: int, seed: int = 2) -> Tensor:
    """H [columns, columns] fp32 = 2/tokens X^T X, symmetric, of such activations."""
    X = activations(tokens, columns, seed).float()
    return (X.t() @ X).mul_(2 / tokens)
