"""Rulers of the room influence in plain torch, on any device: what one would write without it.

Columns are those of distaya_ext/ops/influence.py. `dtype` is that of the logits' product.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2048  # vocabulary entries at a time


def similarity(X: Tensor, Y: Tensor) -> Tensor:
    """1 - cos, angle / pi and |y - x| / |x| as ShortGPT's own code has them, in fp32."""
    x, y = X.float(), Y.float()
    cos = torch.nn.functional.cosine_similarity(x, y, dim=-1)
    moved = (y - x).norm(dim=-1) / x.norm(dim=-1)
    return torch.stack([1 - cos, cos.clamp(-1, 1).arccos() / torch.pi, moved], dim=-1)


def whole_logits(
    P: Tensor, Q: Tensor, W: Tensor, targets: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """KL, both losses and agreement from [tokens, vocabulary] logits: P once, then each Q."""
    head = W.to(dtype).t()
    p = torch.log_softmax((P.to(dtype) @ head).float() * scale, dim=-1)
    out = []
    for h in Q:
        q = torch.log_softmax((h.to(dtype) @ head).float() * scale, dim=-1)
        kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        losses = [-x.gather(1, targets[:, None])[:, 0] for x in (p, q)]
        out.append(torch.stack([kl, *losses, (p.argmax(-1) == q.argmax(-1)).float()], dim=-1))
    return torch.stack(out)


class Sums:
    """Of the rows of one h over the chunks so far: maximum, its place, sum of powers, target."""

    def __init__(self, tokens: int, device: torch.device):
        self.m = torch.full((tokens,), -torch.inf, device=device)
        self.best = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.s, self.target = (torch.zeros(tokens, device=device) for _ in range(2))

    def add(self, z: Tensor, first: int, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Takes logits z; their powers and what earlier sums are multiplied by."""
        most, place = z.max(dim=-1)
        self.best = torch.where(most > self.m, place + first, self.best)
        m = torch.maximum(self.m, most)
        shrink = (self.m - m).exp()
        powers = (z - m[:, None]).exp()
        self.m, self.s = m, self.s * shrink + powers.sum(-1)
        here = (targets >= first) & (targets < first + z.shape[1])
        taken = z.gather(1, (targets - first).clamp(0, z.shape[1] - 1)[:, None])[:, 0]
        self.target = torch.where(here, taken, self.target)
        return powers, shrink

    def lse(self) -> Tensor:
        return self.m + self.s.log()


def chunked_logits(
    P: Tensor, Q: Tensor, W: Tensor, targets: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """The same with logits of CHUNK entries at a time, P's shared by every Q."""
    p, others = P.to(dtype), Q.to(dtype)
    first, rest = Sums(len(P), P.device), [Sums(len(P), P.device) for _ in Q]
    a = [torch.zeros(len(P), device=P.device) for _ in Q]
    for j in range(0, len(W), CHUNK):
        head = W[j : j + CHUNK].to(dtype).t()
        z = (p @ head).float() * scale
        powers, shrink = first.add(z, j, targets)
        for i, h in enumerate(others):
            x = (h @ head).float() * scale
            rest[i].add(x, j, targets)
            a[i] = a[i] * shrink + (powers * (z - x)).sum(-1)
    out = []
    for side, total in zip(rest, a, strict=True):
        kl = total / first.s - first.lse() + side.lse()
        losses = [x.lse() - x.target for x in (first, side)]
        out.append(torch.stack([kl, *losses, (first.best == side.best).float()], dim=-1))
    return torch.stack(out)


def off(ours: Tensor, book: Tensor) -> float:
    """The largest relative distance of a column, agreement as its share of the tokens."""
    ours, book = ours.flatten(0, -2), book.flatten(0, -2)
    columns = ((ours - book).norm(dim=0) / book.norm(dim=0))[:3]
    share = (ours[:, 3:] != book[:, 3:]).float().mean() if ours.shape[1] > 3 else ours.new_zeros(())
    return float(torch.maximum(columns.max(), share))
