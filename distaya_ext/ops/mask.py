"""Which weights stay: importance scores and the masks chosen from them.

A mask is ``torch.bool`` [rows, cols], True where the weight is KEPT. rows are outputs, cols inputs.
Of equal scores the lower index stays, so a mask is the same on every machine and thread count.
"""

import torch
from torch import Tensor

from distaya_ext import _C
from distaya_ext._op import op
from distaya_ext.errors import InputError
from distaya_ext.ops.among import Among


def _fake_score(W: Tensor, method: str, norms: Tensor | None, power: float) -> Tensor:
    return torch.empty_like(W, dtype=torch.float32)


@op(fake=_fake_score)
def mask_score(W: Tensor, method: str, norms: Tensor | None, power: float) -> Tensor:
    """Scores by the name of their method; see magnitude, wanda and ria, which call this."""
    S = torch.empty_like(W, dtype=torch.float32)
    work = None
    if method == "ria" and W.ndim == 2:
        size = _C.mask_score_work(*W.shape)
        work = torch.empty(size, dtype=torch.float64, device=W.device)
    _C.mask_score(W, method, norms, power, work, S)
    return S


def _fake_keep(scores: Tensor, *_args: object) -> tuple[Tensor, Tensor]:
    bad = torch.empty(1, dtype=torch.int64, device=scores.device)
    return torch.empty_like(scores, dtype=torch.bool), bad


@op(fake=_fake_keep)
def mask_keep_k(scores: Tensor, k: int, along: str) -> tuple[Tensor, Tensor]:
    """The mask of keep_k, and int64 [1]: the lowest flat index of a NaN, or -1."""
    return _keep_k(scores, k, along)


def mask_keep_k_among(scores: Tensor, k: int, among: Among) -> tuple[Tensor, Tensor]:
    """mask_keep_k of a whole matrix whose rows lie on several ranks: (this rank's rows, the flag).

    scores are this rank's rows, k the survivors of the matrix, the flag a place in the matrix. It
    exchanges 4 tables of 257 counts, 8224 bytes per rank. Not a torch op: it calls back.
    """
    among.check(scores.shape[0])
    if len(among.rows) == 1:
        return mask_keep_k(scores, k, "matrix")
    return _keep_k(scores, k, "matrix", *among.tables(_C.mask_table, scores.device))


def _keep_k(scores: Tensor, k: int, along: str, *among: object) -> tuple[Tensor, Tensor]:
    mask = torch.empty_like(scores, dtype=torch.bool)
    bad = torch.full((1,), -1, dtype=torch.int64, device=scores.device)
    size = _C.mask_keep_work(scores, along)
    work = torch.empty(size, dtype=torch.int64, device=scores.device) if size else None
    _C.mask_keep_k(scores, k, along, mask, bad, work, *among)
    return mask, bad


@op(fake=_fake_keep)
def mask_keep_nm(scores: Tensor, n: int, m: int, along: str) -> tuple[Tensor, Tensor]:
    """The mask of keep_nm, and int64 [1]: the lowest flat index of a NaN, or -1."""
    mask = torch.empty_like(scores, dtype=torch.bool)
    bad = torch.full((1,), -1, dtype=torch.int64, device=scores.device)
    _C.mask_keep_nm(scores, n, m, along, mask, bad)
    return mask, bad


def magnitude(W: Tensor) -> Tensor:
    """Score of a weight: its size, S = |W|.

    W: fp32, bf16 or fp16 [rows, cols], contiguous. Returns fp32 [rows, cols].
    Raises ValueError for another shape, dtype or layout.
    """
    return mask_score(W, "magnitude", None, 1.0)


def wanda(W: Tensor, norms: Tensor) -> Tensor:
    """Score of a weight: S_ij = |W_ij| * norm_j (Sun et al. 2306.11695, section 3).

    W: fp32, bf16 or fp16 [rows, cols]. norms: fp32 [cols], the root of the mean square of each
    input. Returns fp32 [rows, cols]. Raises ValueError when the two do not fit together.
    """
    return mask_score(W, "wanda", norms, 1.0)


def ria(W: Tensor, norms: Tensor, power: float = 0.5) -> Tensor:
    """Score of a weight relative to its row and column (Zhang et al., ICLR 2024, section 3.2).

    S_ij = (|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) * norm_j ** power, computed in fp64
    and rounded once. A row or column of zeros scores 0.
    W: fp32, bf16 or fp16 [rows, cols]. norms: fp32 [cols]. Returns fp32 [rows, cols].
    Raises ValueError when W and norms do not fit together.
    """
    return mask_score(W, "ria", norms, power)


def keep_k(scores: Tensor, k: int, along: str = "row", among: Among | None = None) -> Tensor:
    """The mask that keeps exactly k scores in each row, in each column, or in the whole matrix.

    scores: fp32 [rows, cols], any sign, infinities allowed; -0 equals 0.
    k: survivors per group, 0 <= k <= size of a group. along: "row", "column" or "matrix".
    among: with "matrix", scores are this rank's rows of it and k counts those of all ranks.
    Returns bool [rows, cols]. Raises ValueError for a NaN, naming its row and column, and for a k
    or an along that does not fit.
    """
    if among is not None:
        if along != "matrix":
            raise InputError(f"among goes with along='matrix', not {along!r}")
        mask, bad = mask_keep_k_among(scores, k, among)
        need_ranked(bad, torch.Size((among.total, scores.shape[1])))
        return mask
    return _without_nan(scores, *mask_keep_k(scores, k, along))


def keep_nm(scores: Tensor, n: int, m: int, along: str = "inputs") -> Tensor:
    """The mask that keeps n scores of every m consecutive ones.

    scores: fp32 [rows, cols], any sign, infinities allowed; -0 equals 0. 1 <= n < m <= 32.
    along: "inputs" (consecutive columns of a row, what sparse tensor cores read) or "outputs"
    (consecutive rows of a column); m must divide that dimension.
    Returns bool [rows, cols]. Raises ValueError for a NaN, naming its row and column, and for an
    n, m or shape that does not fit.
    """
    return _without_nan(scores, *mask_keep_nm(scores, n, m, along))


def _without_nan(scores: Tensor, mask: Tensor, bad: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # no host read inside a graph: the graph itself asserts
        torch._assert_async(bad < 0, "scores contain a NaN, which has no rank")
        return mask
    need_ranked(bad, scores.shape)
    return mask


def need_ranked(bad: Tensor, shape: torch.Size) -> None:
    """Raise ValueError for what mask_keep_k and mask_keep_nm found in scores of that shape."""
    index = int(bad)
    if index >= 0:
        row, column = divmod(index, shape[1])
        raise ValueError(
            f"scores {list(shape)} is NaN at row {row}, column {column}: it has no rank"
        )


def reference_score(
    W: Tensor, method: str, norms: Tensor | None = None, power: float = 0.5
) -> Tensor:
    """What magnitude, wanda and ria compute, in plain torch float64. Returns fp64 [rows, cols]."""
    A = W.double().abs()
    if method == "magnitude":
        return A
    if method == "wanda":
        return A * norms.double()
    row, column = A.sum(1, keepdim=True), A.sum(0, keepdim=True)
    relative = A / row.where(row > 0, 1.0) + A / column.where(column > 0, 1.0)
    return relative * norms.double() ** power


def reference_keep(groups: Tensor, k: int) -> Tensor:
    """The k best of each row of ``groups`` by a stable sort. Returns bool like ``groups``."""
    order = groups.double().argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, :k], True)


def reference(scores: Tensor, n: int, m: int | None = None, along: str = "row") -> Tensor:
    """keep_k (m is None, n = k) and keep_nm by sorting, in torch. Returns bool [rows, cols]."""
    rows, cols = scores.shape
    if along in ("column", "outputs"):
        return reference(scores.t(), n, m, "inputs" if m else "row").t().contiguous()
    size = m or (rows * cols if along == "matrix" else cols)
    return reference_keep(scores.reshape(-1, size), n).reshape(rows, cols)
