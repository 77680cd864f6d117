"""How far two hidden states, or what the head makes of them, lie apart, token by token.

    similarity   1 - cos, angle and relative change of two hidden states
    divergence   KL, both losses and agreement of the two distributions over the vocabulary, which
                 is walked in blocks: no tensor [tokens, vocabulary] exists

Sources: Men et al. 2024, ShortGPT (2403.03853) and Gromov et al. 2024 (2403.17887) for what is
compared. See csrc/influence/influence.h for every rule and bound.
"""

import torch
from torch import Tensor

from distaya_ext import _C
from distaya_ext._op import op
from distaya_ext.errors import InputError


def _fake_similarity(X: Tensor, Y: Tensor) -> Tensor:
    return X.new_empty((X.shape[0], 3), dtype=torch.float32)


def _fake_divergence(
    P: Tensor,
    Q: Tensor,
    W: Tensor,
    targets: Tensor,
    scale: float,
    cap: float | None,
    bias: Tensor | None,
) -> Tensor:
    return Q.new_empty((Q.shape[0], Q.shape[1], 4), dtype=torch.float32)


@op(fake=_fake_similarity)
def influence_similarity(X: Tensor, Y: Tensor) -> Tensor:
    """See similarity; X, Y [tokens, hidden], contiguous and of one dtype."""
    out = X.new_empty((X.shape[0], 3), dtype=torch.float32)
    _C.similarity(X, Y, out)
    return out


@op(fake=_fake_divergence)
def influence_divergence(
    P: Tensor,
    Q: Tensor,
    W: Tensor,
    targets: Tensor,
    scale: float,
    cap: float | None,
    bias: Tensor | None,
) -> Tensor:
    """See divergence; Q [variants, tokens, hidden], everything contiguous."""
    out = Q.new_empty((Q.shape[0], Q.shape[1], 4), dtype=torch.float32)
    work = torch.empty(_C.divergence_work(Q), dtype=torch.uint8, device=Q.device)
    _C.divergence(P, Q, W, bias, targets, scale, cap, out, work)
    return out


def similarity(X: Tensor, Y: Tensor) -> Tensor:
    """Float32 [tokens, 3]: 1 - cos(x, y), angle(x, y) / pi and |y - x| / |x| of each row.

    X, Y [..., hidden] bf16, fp16 or fp32, of one shape; tokens is the product of the other sizes.
    Correct to fp32's rounding, also for nearly equal rows. Two rows of zeros are the same (0, 0,
    0); one alone is at a right angle to everything (1, 1/2, and Inf or 1). Rows with a NaN or an
    Inf give NaN. Raises ValueError for shapes, dtypes and devices that do not fit.
    """
    if X.shape != Y.shape or X.dim() == 0:
        raise InputError(f"Y {list(Y.shape)} does not have the shape of X {list(X.shape)}")
    if X.dtype != Y.dtype:  # exact
        X, Y = X.float(), Y.float()
    hidden = X.shape[-1]
    rows = X.numel() // hidden if hidden else X.shape[:-1].numel()
    return influence_similarity(
        X.reshape(rows, hidden).contiguous(), Y.reshape(rows, hidden).contiguous()
    )


def similarity_runs(states: Tensor, length: int) -> Tensor:
    """``similarity`` of each state with the one `length` layers on: float32 [starts, tokens, 3].

    states [layers + 1, tokens, hidden]: the hidden states before each layer and after the last.
    starts = layers + 1 - length: what leaving out layers [start, start + length) would skip.
    Raises ValueError unless 1 <= length <= layers.
    """
    if states.dim() != 3 or not 1 <= length < len(states):
        raise InputError(
            f"a run of {length} layers does not fit states of shape {list(states.shape)}"
        )
    starts, tokens = len(states) - length, states.shape[1]
    return similarity(states[:starts], states[length:]).view(starts, tokens, 3)


def divergence(
    P: Tensor,
    Q: Tensor,
    W: Tensor,
    targets: Tensor,
    *,
    scale: float = 1.0,
    cap: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Float32 [tokens, 4]: KL(p || q), -log p(target), -log q(target) in nats, and 1 where both
    have the same first choice (else 0); p and q are softmax(z) of z = cap * tanh(scale * (h W^T +
    bias) / cap) (without cap: scale * (h W^T + bias)), h the rows of P and Q.

    P        [tokens, hidden] bf16, fp16 or fp32: what the head is given
    Q        [tokens, hidden]; or [variants, tokens, hidden] for several at once, which share p's
             logits: the result is [variants, tokens, 4] then
    W        [vocabulary, hidden] bf16, fp16 or fp32, contiguous; converted a block at a time
    targets  int64 [tokens], each in [0, vocabulary); on CUDA nobody looks: -log is NaN for others
    scale    logit_scale of Cohere; cap: final_logit_softcapping of Gemma 2, above 0
    bias     [vocabulary], -Inf for entries that cannot be chosen

    Logits are fp32. KL is at least 0: what rounding leaves below is set to 0. NaN in a row stays
    with its token. Scratch does not grow with the vocabulary. Raises ValueError for shapes, dtypes,
    devices, targets and options that do not fit.
    """
    if Q.dim() not in (2, 3):
        raise InputError(
            f"Q {list(Q.shape)} must be [tokens, hidden] or [variants, tokens, hidden]"
        )
    stack = Q if Q.dim() == 3 else Q[None]
    if bias is not None:
        bias = bias.contiguous()
    out = influence_divergence(
        P.contiguous(), stack.contiguous(), W, targets.contiguous(), scale, cap, bias
    )
    return out if Q.dim() == 3 else out[0]


def reference_similarity(X: Tensor, Y: Tensor) -> Tensor:
    """``similarity`` in float64, for rows that are finite and not zero."""
    x, y = (part.reshape(-1, part.shape[-1]).double() for part in (X, Y))
    a, b = (v / v.norm(dim=-1, keepdim=True) for v in (x, y))
    apart, together = (a - b).norm(dim=-1), (a + b).norm(dim=-1)
    angle = 2 * torch.atan2(apart, together) / torch.pi
    return torch.stack([apart**2 / 2, angle, (y - x).norm(dim=-1) / x.norm(dim=-1)], dim=-1)


def reference_logits(
    h: Tensor, W: Tensor, scale: float = 1.0, cap: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """Float64 logits [..., vocabulary] as ``divergence`` has them."""
    z = h.double() @ W.double().T
    if bias is not None:
        z = z + bias.double()
    z = z * scale
    return z if cap is None else cap * (z / cap).tanh()


def reference_divergence(
    P: Tensor,
    Q: Tensor,
    W: Tensor,
    targets: Tensor,
    *,
    scale: float = 1.0,
    cap: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``divergence`` in float64 with whole logits."""
    p, q = (reference_logits(h, W, scale, cap, bias).log_softmax(-1) for h in (P, Q))
    p = p.expand_as(q)
    kl = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(dim=-1)
    nll = [-part.gather(-1, targets.expand(part.shape[:-1])[..., None])[..., 0] for part in (p, q)]
    return torch.stack([kl, *nll, (p.argmax(-1) == q.argmax(-1)).double()], dim=-1)
