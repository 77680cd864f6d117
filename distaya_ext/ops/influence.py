"""How far two hidden states, or what the head makes of them, lie apart, token by token."""

from __future__ import annotations

import torch


def similarity(X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    """Float32 [tokens, 3]: 1 - cos(x, y), angle(x, y) / pi and |y - x| / |x| of each row.

    X, Y [..., hidden] bf16, fp16 or fp32, of one shape.
    """
    x, y = (part.reshape(-1, part.shape[-1]).double() for part in (X, Y))
    cos = torch.nn.functional.cosine_similarity(x, y, dim=-1, eps=1e-300)
    rel = (y - x).norm(dim=-1) / x.norm(dim=-1)
    return torch.stack([1 - cos, cos.clamp(-1, 1).arccos() / torch.pi, rel], dim=-1).float()


def divergence(
    P: torch.Tensor,
    Q: torch.Tensor,
    W: torch.Tensor,
    targets: torch.Tensor,
    *,
    scale: float = 1.0,
    cap: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Float32 [tokens, 4]: KL(p || q), -log p(target), -log q(target) in nats, and 1 where both
    have the same first choice; p and q are softmax(z) of z = cap * tanh(scale * (h W^T + bias) /
    cap) (without cap: scale * (h W^T + bias)), h the rows of P and Q.

    P, Q [tokens, hidden], W [vocabulary, hidden], targets int64 [tokens].
    """
    z = []
    for h in (P, Q):
        logits = h.double() @ W.double().T
        if bias is not None:
            logits = logits + bias.double()
        logits = logits * scale
        z.append(torch.log_softmax(logits if cap is None else cap * (logits / cap).tanh(), dim=-1))
    p, q = z
    kl = (p.exp() * (p - q)).sum(dim=-1)
    nll = [-part.gather(1, targets[:, None])[:, 0] for part in z]
    return torch.stack([kl, *nll, (p.argmax(-1) == q.argmax(-1)).double()], dim=-1).float()
