"""Rulers of the rooms refit and dass in plain torch, on any device: as published, in fp32.

ALPS (Meng et al. 2024) for refit and admm; one round of exchanges between groups of neurons as
csrc/dass/dass.h has it.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

TINY = 1e-30  # keeps 0 / 0 of a finished row at 0
GAIN = 2.0**-11  # share of its mass that an exchange must save, as in csrc/dass/dass.h


def refit(
    W: Tensor, mask: Tensor, H: Tensor, *, damp: float = 0.01, iterations: int = 10
) -> Tensor:
    """Conjugate gradients on the kept weights, preconditioned by the diagonal of H'."""
    H = H.clone()
    H.diagonal().add_(damp * H.diagonal().mean())
    keep, inverse = mask.float(), 1 / H.diagonal()
    Q = W * keep
    r = ((W - Q) @ H) * keep
    p = r * inverse
    rz = (r * p).sum(1, keepdim=True)
    for _ in range(iterations):
        y = p @ H
        a = rz / ((p * y).sum(1, keepdim=True) + TINY)
        Q += a * p
        r -= a * (y * keep)
        z = r * inverse
        after = (r * z).sum(1, keepdim=True)
        p = z + after / (rz + TINY) * p
        rz = after
    return Q


def admm_iteration(
    G: Tensor, mask: Tensor, Y: Tensor, inverse: Tensor, rho: float
) -> tuple[Tensor, Tensor]:
    """One iteration with weights D and dual V / rho = U in one array G: (the next G, its scores).

    inverse: of the damped Gram matrix plus rho.
    """
    U = G.masked_fill(mask, 0.0)
    G = torch.addmm(U, torch.add(Y, G - 2 * U, alpha=rho), inverse)
    return G, G.abs()


def admm(
    T: Tensor,
    H: Tensor,
    *,
    damp: float = 0.01,
    iterations: int = 30,
    rho: tuple[float, float] = (0.03, 3.0),
    levels: int = 6,
) -> Tensor:
    """Weights at 2:4 on unit columns, rho in geometric steps, each with an inverse; levels divides
    iterations."""
    d = H.diagonal().sqrt()
    A = H / d / d[:, None]
    A.diagonal().fill_(1 + damp)
    G = T * d
    Y = G @ A
    mask, before = keep_2_4(G.abs()), 0.0
    for level in range(levels):
        now = rho[0] * (rho[1] / rho[0]) ** (level / (levels - 1))
        shifted = A.clone()
        shifted.diagonal().add_(now)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
        for _ in range(iterations // levels):
            G = torch.where(mask, G, G * (before / now))  # the dual over the new rho
            G, scores = admm_iteration(G, mask, Y, inverse, now)
            mask, before = keep_2_4(scores), now
    return G * mask / d


def keep_2_4(scores: Tensor) -> Tensor:
    """The mask, by a network of minima and maxima, faster than topk; equal scores both stay."""
    a, b, c, d = scores.view(-1, 4).unbind(1)
    between = torch.minimum(torch.maximum(a, b), torch.maximum(c, d))
    lower = torch.maximum(torch.minimum(a, b), torch.minimum(c, d))
    second = torch.maximum(between, lower)
    return (scores.view(-1, 4) >= second[:, None]).view_as(scores)


def balance_round(scores: Tensor, order: Tensor, n: int, m: int, step: int = 512) -> Tensor:
    """The first round of exchanges from an order of neurons: every group has one partner, and the
    pair makes the exchange that lowers the mass pruned from both most, if one does.

    scores: [neurons, features]. `step` pairs at a time, so that the copies stay small.
    """
    found = order.view(-1, m).clone()
    groups = len(found)
    last = groups + groups % 2 - 1  # of an odd number one group sits out
    pairs = [(k % last, (last - k) % last) for k in range(1, (last + 1) // 2)]
    pairs += [(0, last)] if last < groups else []
    if not pairs:
        return order.clone()
    first, second = torch.tensor(pairs, device=order.device).t()
    for a, b in zip(first.split(step), second.split(step), strict=True):
        found[a], found[b] = exchanged(scores, found[a], found[b], n)
    return found.flatten()


def exchanged(scores: Tensor, a: Tensor, b: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Groups a, b [pairs, m] of neurons after the best exchange of each pair.

    One sort of each group: with x_i replaced by y, `without_i + min(y, last_i)` is pruned of it.
    """
    m = a.shape[1]
    x, y = scores[a], scores[b]  # [pairs, m, features]
    (now_x, without_x, last_x), (now_y, without_y, last_y) = replaced(x, m - n), replaced(y, m - n)
    masses = [(now_x + now_y).sum((1, 2)) * (1 - GAIN)]
    for i, j in itertools.product(range(m), repeat=2):
        one = without_x[:, i] + torch.minimum(y[:, j], last_x[:, i])
        other = without_y[:, j] + torch.minimum(x[:, i], last_y[:, j])
        masses.append((one + other).sum(1))
    best = torch.stack(masses).argmin(0)[:, None]
    gains, place = best > 0, (best - 1).clamp(min=0)
    i, j = place // m, place % m
    left, right = a.gather(1, i), b.gather(1, j)
    return (
        a.scatter(1, i, torch.where(gains, right, left)),
        b.scatter(1, j, torch.where(gains, left, right)),
    )


def replaced(x: Tensor, dropped: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of x [pairs, m, features]: the sum of the `dropped` smallest; for each i that of the dropped
    - 1 smallest of the others, and the next one of them."""
    ranked = x.sort(dim=1).values
    pruned = ranked[:, :dropped].sum(1, keepdim=True)
    worst, following = ranked[:, dropped - 1 : dropped], ranked[:, dropped : dropped + 1]
    inside = x <= worst
    return pruned, pruned - torch.where(inside, x, worst), torch.where(inside, following, worst)
