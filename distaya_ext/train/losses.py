"""What a student loses against its teacher: pure functions of tensors.

Per position first (so that a vocabulary's logits may come a few tokens at a time), means after.
Logits are turned into float32 before any exponential, float64 stays. Positions that do not count
are given by `counted`, bool, of the shape of the positions; a mean over no position at all is 0.

The forms are DistillKit's (arcee-ai/DistillKit, lossfuncs/*): T^2 KL divided by the counted tokens,
hidden states compared over the masked tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["forward", "reverse", "jsd"]


def divergence(
    teacher: Tensor, student: Tensor, temperature: float = 1.0, kind: Kind = "forward"
) -> Tensor:
    """T^2 D(p, q) in nats of every position, p = softmax(teacher / T) and q = softmax(student / T).

    teacher, student  logits [..., vocabulary]; the result is [...] in float32 (float64 of float64)
    kind  forward: KL(p || q); reverse: KL(q || p); jsd: (KL(p || m) + KL(q || m)) / 2 with
          m = (p + q) / 2
    """
    log_p = torch.log_softmax(_wide(teacher) / temperature, dim=-1)
    log_q = torch.log_softmax(_wide(student) / temperature, dim=-1)
    if kind == "forward":
        found = _relative(log_p, log_q)
    elif kind == "reverse":
        found = _relative(log_q, log_p)
    elif kind == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - torch.log(log_p.new_tensor(2.0))
        found = (_relative(log_p, log_m) + _relative(log_q, log_m)) / 2
    else:
        raise ValueError(f"kind {kind!r} is none of forward, reverse and jsd")
    return temperature**2 * found


def sparse_divergence(
    values: Tensor, ids: Tensor, rest: Tensor, student: Tensor, temperature: float = 1.0
) -> Tensor:
    """T^2 KL(P || Q) in nats over k + 1 outcomes: the k tokens a teacher's record holds and one
    bucket for all the others.

    values   log p of the k tokens [..., k], ids int64 [..., k] which they are (all different)
    rest     log of the probability of all other tokens [...]; -inf where there is none
    student  logits [..., vocabulary]

    P is softmax((values, rest) / T) and Q is softmax((log q_ids, log sum of the other q) / T) with
    q = softmax(student). At T = 1 this is the KL of p and q after the other tokens were merged, so
    never more than the full KL(p || q), and equal to it when k is the vocabulary. At another T the
    bucket is tempered as one outcome: with k = vocabulary still the full loss, below it a loss of
    its own, 0 where P = Q.
    """
    log_q = torch.log_softmax(_wide(student), dim=-1)
    whole = ids.shape[-1] == student.shape[-1]
    kept = log_q.gather(-1, ids)
    if whole:
        log_p = _wide(values)
    else:
        others = log_q.scatter(-1, ids, float("-inf")).logsumexp(dim=-1, keepdim=True)
        kept = torch.cat([kept, others], dim=-1)
        log_p = torch.cat([_wide(values), _wide(rest)[..., None]], dim=-1)
    if temperature != 1.0:
        kept, log_p = kept / temperature, log_p / temperature
        kept = torch.log_softmax(kept, dim=-1)
    return temperature**2 * _relative(torch.log_softmax(log_p, dim=-1), kept)


def top(teacher: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """What sparse_divergence takes of a teacher's logits [..., vocabulary]: log p of its k most
    probable tokens, largest first, their ids, and the log of what is left (-inf: nothing is).
    """
    log_p = torch.log_softmax(_wide(teacher), dim=-1)
    values, ids = log_p.topk(k, dim=-1)
    if k == log_p.shape[-1]:
        return values, ids, torch.full_like(values[..., 0], float("-inf"))
    return values, ids, log_p.scatter(-1, ids, float("-inf")).logsumexp(dim=-1)


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] of every position; logits [..., vocabulary], targets [...] int64
    (where they are negative the result is that of token 0, to be left out by `counted`).
    """
    log_q = torch.log_softmax(_wide(logits), dim=-1)
    return -log_q.gather(-1, targets.clamp_min(0)[..., None])[..., 0]


def kl(
    teacher: Tensor,
    student: Tensor,
    counted: Tensor,
    temperature: float = 1.0,
    kind: Kind = "forward",
) -> Tensor:
    """T^2 sum_t D(p_t, q_t) / N over the N counted positions, a 0-d tensor; see divergence."""
    return mean(divergence(teacher, student, temperature, kind), counted)


def cross_entropy(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Mean of nll over the counted positions."""
    return mean(nll(logits, targets), counted)


def cosine(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """sum (1 - cos(s_t, h_t)) / N over the N counted positions of hidden states [..., hidden]."""
    near = torch.nn.functional.cosine_similarity(_wide(student), _wide(teacher), dim=-1)
    return mean(1 - near, counted)


def mse(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """sum |s_t - h_t|^2 / (N d) over the N counted positions of hidden states [..., d]."""
    return mean((_wide(student) - _wide(teacher)).square().mean(dim=-1), counted)


def mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of values over the positions counted, both [...]; whatever stands elsewhere (NaN too)
    has no say, and neither has its gradient.
    """
    kept = values[counted]
    return kept.sum() / max(1, kept.numel())


def total(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """sum w_i L_i / sum w_i over the terms of weight above 0, each of which must be there."""
    used = {name: weight for name, weight in weights.items() if weight > 0}
    return sum(weight * terms[name] for name, weight in used.items()) / sum(used.values())


def shifted(labels: Tensor) -> tuple[Tensor, Tensor]:
    """What the logits of every position but the last are to predict, int64 [rows, length - 1], and
    whether it counts: label t + 1 is the token at t + 1, or -100.
    """
    targets = labels[:, 1:]
    return targets, targets != -100


def _relative(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p (log p - log q); an outcome of probability 0 adds nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=-1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
