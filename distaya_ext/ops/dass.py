"""DaSS: pruning that knows how the three matrices of a gated MLP depend on each other.

y = down a, a = act(g) * u, g = gate x, u = up x (SwiGLU with silu, GeGLU with gelu or gelu_tanh).
gate and up are [neurons, inputs], down is [outputs, neurons]; a neuron is a row of gate and of up
and a column of down. Source: Guo et al., Dependency-aware Semi-structured Sparsity of GLU Variants
in Large Language Models, arXiv 2405.01943.

Scores with alpha 0, 0.5 or 1, the masks chosen from them and the order that ``balance`` finds are
the same on every machine. See csrc/dass/dass.h for every rule.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from distaya_ext import _C
from distaya_ext._op import op
from distaya_ext.errors import InputError

from . import mask as mask_op
from .hessian import column_sq_

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
DIRECTIONS = ("outputs", "inputs")
ROUNDS = 64  # of balance: most of what it can gain


def _fake_score(W: Tensor, norms: Tensor, power: float) -> Tensor:
    return torch.empty_like(W, dtype=torch.float32)


@op(fake=_fake_score)
def dass_score(W: Tensor, norms: Tensor, power: float) -> Tensor:
    """See gate_up."""
    S = torch.empty_like(W, dtype=torch.float32)
    _C.dass_score(W, norms, power, S)
    return S


@op(mutates=("s",))
def dass_moments_(s: Tensor, gate: Tensor, up: Tensor, act: str, weights: Tensor | None) -> None:
    """See moments_."""
    _C.dass_moments(s, gate, up, act, weights)


@op(mutates=("order",))
def dass_balance_(order: Tensor, scores: Tensor, n: int, m: int, rounds: int) -> None:
    """The raw exchanges on an order that is given; on CUDA its entries are not looked at."""
    _C.dass_balance(scores, n, m, rounds, order)


def gate_up(W: Tensor, a_norm: Tensor, alpha: float = 0.5) -> Tensor:
    """Score of a weight of gate or up: S_ij = |W_ij| * a_norm_i ** alpha.

    W: fp32, bf16 or fp16 [neurons, inputs]. a_norm: fp32 [neurons], the root of the mean square of
    each input of down, before anything of this MLP is pruned. alpha: 0.5 in the paper.
    Computed in fp64 and rounded once. Returns fp32 [neurons, inputs]. Raises ValueError when the
    two do not fit together or alpha is negative.
    """
    return dass_score(W, a_norm, alpha)


def moments_(s: Tensor, gate: Tensor, up: Tensor, act: str, weights: Tensor | None = None) -> None:
    """s += sums over tokens of (act(g) u)^2, of act(g)^2 and of (act'(g) u)^2, per neuron.

    s: fp64 [3, neurons]. gate, up: outputs g and u of the two Linears, fp32, bf16 or fp16 [tokens,
    neurons]. act: "silu", "gelu" (erf) or "gelu_tanh". weights: fp32 [tokens], finite and >= 0, or
    None for all 1. a is never formed. Raises ValueError for anything else.
    """
    dass_moments_(s, gate, up, act, weights)


class Masks(NamedTuple):
    """bool, True = kept; shaped like the matrices."""

    gate: Tensor
    up: Tensor
    down: Tensor


def masks(
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    a_norm: Tensor,
    *,
    sparsity: float | None = None,
    nm: tuple[int, int] | None = None,
    direction: str = "outputs",
    alpha: float = 0.5,
) -> Masks:
    """The masks of DaSS for one gated MLP.

    gate, up: [neurons, inputs]; down: [outputs, neurons]. a_norm: see gate_up.
    sparsity: the floor(size * sparsity) smallest of a group go; or nm = (n, m): n of every m are
    kept. direction "outputs" is the paper's: a group of gate and up is one input column, and N:M
    counts consecutive neurons in it. "inputs": a group is one row, and N:M counts consecutive
    inputs, as sparse tensor cores read them. There a_norm is the same for a whole group, so the
    choice is that of magnitude. down is always Wanda's: along its inputs, with a_norm.
    Of equal scores the lower index stays. Raises ValueError for shapes, patterns and scores (NaN)
    that do not fit.
    """
    _check(gate, up, down, a_norm)
    if direction not in DIRECTIONS:
        raise InputError(f"direction is {direction!r} but must be outputs or inputs")
    scores = (gate_up(gate, a_norm, alpha), gate_up(up, a_norm, alpha))
    parts = [choose(S, sparsity, nm, direction) for S in scores]
    parts.append(choose(mask_op.wanda(down, a_norm), sparsity, nm, "inputs"))
    for part, W in zip(parts, (gate, up, down), strict=True):
        mask_op.need_ranked(part[1], W.shape)
    return Masks(*(part[0] for part in parts))


def choose(
    scores: Tensor, sparsity: float | None, nm: tuple[int, int] | None, direction: str
) -> tuple[Tensor, Tensor]:
    """The mask of scores [rows, cols] by a share or a pattern, and what mask.need_ranked judges.

    direction: what the groups run along, "outputs" (a column) or "inputs" (a row). Nothing waits
    for the device. Raises ValueError unless there is one of sparsity and nm, and it fits.
    """
    if (sparsity is None) == (nm is None):
        raise InputError("masks take a share (sparsity) or a pattern (nm), one of them")
    if nm is not None:
        return mask_op.mask_keep_nm(scores, *nm, direction)
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity {sparsity} is outside [0, 1)")
    size = scores.shape[0] if direction == "outputs" else scores.shape[1]
    along = "column" if direction == "outputs" else "row"
    return mask_op.mask_keep_k(scores, size - int(size * sparsity), along)


def _check(gate: Tensor, up: Tensor, down: Tensor, a_norm: Tensor) -> None:
    fits = gate.dim() == 2 and gate.shape == up.shape and down.dim() == 2
    if not fits or down.shape[1] != gate.shape[0] or a_norm.shape != gate.shape[:1]:
        raise InputError(
            f"gate {list(gate.shape)}, up {list(up.shape)}, down {list(down.shape)} and a_norm "
            f"{list(a_norm.shape)} are not of one gated MLP: [neurons, inputs] twice, [outputs, "
            "neurons] and [neurons]"
        )


def neuron_scores(
    gate: Tensor, up: Tensor, down: Tensor, moments: Tensor, x_norm: Tensor
) -> Tensor:
    """How much the MLP's output has to lose, to first order, by pruning at each neuron.

        |down_i|^2 (E[a^2] + E[(act' u)^2] |gate_i x_norm|^2 + E[act^2] |up_i x_norm|^2)

    a share of a column of down costs that share of the first term, of a row of gate or up that of
    the second or third. Scaling a row of up against its column of down changes nothing.
    gate, up: [neurons, inputs]; down: [outputs, neurons]; moments: of moments_; x_norm: fp32
    [inputs], root mean squares. Returns fp64 [neurons]. Raises ValueError for other shapes.
    """
    _check(gate, up, down, moments[0])
    squares = x_norm.square()
    out = _column_sq(down).double()
    g, u = (_column_sq(W.t().contiguous(), squares).double() for W in (gate, up))
    return out * (moments[0] + moments[2] * g + moments[1] * u)


def _column_sq(X: Tensor, weights: Tensor | None = None) -> Tensor:
    s = torch.zeros(X.shape[1], dtype=torch.float32, device=X.device)
    column_sq_(s, X, weights)
    return s


def balance(
    scores: Tensor,
    nm: tuple[int, int],
    rounds: int = ROUNDS,
    among: Tensor | None = None,
) -> Tensor:
    """An order of the neurons in which less is pruned at N:M along it.

    scores: fp32 >= 0 [neurons, features], those of a neuron's weights: columns of down, in the
    direction of outputs also rows of gate and up. among: int64, the neurons to order, different
    ones; None: all. m must divide their number. They are dealt to
    the groups by their sums, so that each group gets one of every rank (unless that prunes more
    than the order they have); then neurons of two groups are exchanged while the mass pruned falls
    (groups of 2, 4 or 8), for at most `rounds` rounds.
    Returns int64: the neuron that goes to each place. Raises ValueError for shapes.
    """
    n, m = nm
    here = torch.arange(len(scores), device=scores.device) if among is None else among
    if len(here) % m:
        raise InputError(f"{len(here)} neurons are no whole number of groups of {m}")
    dealt = here[_deal(scores.sum(1, dtype=torch.float64)[here], m)]
    better = pruned_mass(scores, dealt, nm) < pruned_mass(scores, here, nm)
    order = torch.where(better, dealt, here)
    if m in (2, 4, 8):
        dass_balance_(order, scores, n, m, rounds)
    return order


def _deal(sums: Tensor, m: int) -> Tensor:
    """The largest to the groups from the first to the last, the next back from the last, ..."""
    ranks = sums.argsort(descending=True, stable=True).view(m, -1)
    ranks[1::2] = ranks[1::2].flip(1)
    return ranks.t().reshape(-1)


def pruned_mass(scores: Tensor, order: Tensor, nm: tuple[int, int]) -> Tensor:
    """Sum of the scores pruned at N:M along an order of neurons, fp64 scalar. See balance."""
    n, m = nm
    total = torch.zeros((), dtype=torch.float64, device=scores.device)
    step = max(1, (1 << 24) // max(1, m * scores.shape[1])) * m
    for part in order.split(step):
        groups = scores[part].view(-1, m, scores.shape[1])
        total += total_of(groups.sort(dim=1).values[:, : m - n].flatten(0, 1))
    return total


def total_of(x: Tensor) -> Tensor:
    """Sum of x [rows, cols] in fp64, row by row: its order does not depend on the threads."""
    return x.sum(1, dtype=torch.float64).sum()


def arrange(
    worth: Tensor,
    dense: int,
    scores: Tensor | None = None,
    nm: tuple[int, int] | None = None,
    rounds: int = ROUNDS,
) -> Tensor:
    """An order of the neurons with the `dense` of greatest worth at its end.

    worth: [neurons], see neuron_scores. The others keep their order or, given scores and nm, are
    balanced. Returns int64 [neurons]. Raises ValueError for a dense that does not fit.
    """
    if not 0 <= dense <= len(worth):
        raise InputError(f"{dense} of {len(worth)} neurons cannot stay dense")
    ranks = worth.argsort(descending=True, stable=True)
    last, rest = ranks[:dense].sort().values, ranks[dense:].sort().values
    if scores is not None and nm is not None and len(rest):
        rest = balance(scores, nm, rounds, rest)
    return torch.cat([rest, last])
