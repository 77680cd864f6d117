"""In which order a sweep visits the columns: those that will lose most come first, while there are
still many weights to make up for them.

What a column will lose is estimated before the sweep, as Wanda would prune: the sum over rows of
w² H_jj where that is among the least. For N:M patterns whole groups move (the patterns stay where
they are); for a share the columns move inside their block of 128 and then the blocks, so that no
weight comes under another threshold ("ROSE", arXiv 2603.05878). A last group or block that is
shorter stays last. All sums have a fixed order.
"""

import torch
from torch import Tensor

from distaya_ext.errors import InputError
from distaya_ext.ops import mask as mask_op
from distaya_ext.ops.among import Among
from distaya_ext.ops.hessian import column_sq_

BLOCK = 128  # columns of a block of the sweep (csrc/obs/obs.h)
COUPLED = ("group", "block")  # orders that all rows have a say in
ORDERS = ("natural", "activation", "group", "block")


def check_order(
    order: str | Tensor,
    W: Tensor,
    H: Tensor | None,
    nm: tuple[int, int] | None,
    sparsity: float | None,
    wait: bool = True,
    among: Among | None = None,
) -> None:
    """Raise InputError for an order that is none or does not go with what is pruned.

    wait: look at the values of a given permutation, too. among: W is only this rank's rows.
    """
    if isinstance(order, Tensor):
        cols = W.shape[1]
        if order.dtype != torch.int64 or order.shape != (cols,) or order.device != W.device:
            raise InputError(
                f"order must be int64 [{cols}] on {W.device.type}, not "
                f"{str(order.dtype)[6:]} {list(order.shape)} on {order.device.type}"
            )
        if wait and not bool((order.sort().values == torch.arange(cols, device=W.device)).all()):
            raise InputError(f"order must hold every column of 0 to {cols - 1} once")
    elif order not in ORDERS:
        raise InputError(f"order must be one of {', '.join(ORDERS)}, not {order!r}")
    elif order == "activation" and nm is not None:
        raise InputError(f"order='activation' would tear the {nm[0]}:{nm[1]} groups apart")
    elif order == "group" and nm is None:
        raise InputError("order='group' moves whole N:M groups, so it needs nm")
    elif order == "block" and not sparsity:
        raise InputError("order='block' is for a share of the weights, so it needs a sparsity > 0")
    elif order in COUPLED and among is not None and len(among.rows) > 1:
        raise InputError(
            f"order={order!r} looks at all rows, and this rank has {W.shape[0]} of {among.total}: "
            "give the permutation of the whole matrix"
        )
    if H is None and not (isinstance(order, str) and order == "natural"):
        name = "a given order" if isinstance(order, Tensor) else f"order={order!r}"
        raise InputError(f"{name} needs H: the factor depends on the order")


def permutation(
    order: str | Tensor,
    W: Tensor,
    H: Tensor,
    nm: tuple[int, int] | None,
    sparsity: float | None,
) -> Tensor | None:
    """int64 [cols]: the column visited first, second, ...; None for the natural order.

    W [rows, cols] float32, bfloat16 or float16, contiguous; H [cols, cols]; on one device, which
    nothing waits for.
    """
    if isinstance(order, Tensor):
        return order
    if order == "natural" or W.numel() == 0:
        return None
    if order == "activation":
        return torch.argsort(H.diagonal(), descending=True, stable=True)
    scores = mask_op.wanda(W, H.diagonal().clamp(min=0).sqrt())
    return _groups(scores, *nm) if order == "group" else _blocks(scores, sparsity)


def _groups(scores: Tensor, n: int, m: int) -> Tensor:
    cols = scores.shape[1]
    whole = cols // m * m
    natural = torch.arange(cols, device=scores.device)
    if whole == 0 or n == m:
        return natural
    scores = scores[:, :whole].contiguous()
    lost = _lost(scores, mask_op.mask_keep_nm(scores, n, m, "inputs")[0]).view(-1, m)
    first = torch.argsort(lost.sum(1), descending=True, stable=True) * m
    return torch.cat([(first[:, None] + natural[:m]).flatten(), natural[whole:]])


def _blocks(scores: Tensor, sparsity: float) -> Tensor:
    cols = scores.shape[1]
    lost = torch.cat([_lost_in_block(part, sparsity) for part in scores.split(BLOCK, dim=1)])
    natural = torch.arange(cols, device=scores.device)
    whole = cols // BLOCK * BLOCK
    inside = [torch.argsort(x, descending=True, stable=True) for x in lost[:whole].split(BLOCK)]
    last = whole + torch.argsort(lost[whole:], descending=True, stable=True)
    if not inside or whole == 0:
        return last
    blocks = torch.stack(inside) + natural[:whole:BLOCK, None]
    totals = lost[:whole].view(-1, BLOCK).sum(1)
    blocks = blocks[torch.argsort(totals, descending=True, stable=True)]
    return torch.cat([blocks.flatten(), last])


def _lost_in_block(scores: Tensor, sparsity: float) -> Tensor:
    scores = scores.contiguous()
    count = scores.numel() - int(scores.numel() * sparsity)
    return _lost(scores, mask_op.mask_keep_k(scores, count, "matrix")[0])


def _lost(scores: Tensor, keep: Tensor) -> Tensor:
    """Sum of squares down each column, of what is not kept; float32 [cols]."""
    sums = torch.zeros(scores.shape[1], dtype=torch.float32, device=scores.device)
    column_sq_(sums, scores.masked_fill(keep, 0.0), None)
    return sums
