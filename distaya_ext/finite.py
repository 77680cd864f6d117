"""Whether a tensor holds NaN or infinity, in one pass that writes nothing, and where."""

import torch

from .errors import InputError


def all_finite(x: torch.Tensor) -> bool:
    """True when every element of x (any shape, floating point) is finite.

    NaN passes through aminmax and infinity is an extreme, so two numbers tell; torch.isfinite
    would write a mask as large as x and takes some fifty times as long on a CPU.
    """
    return x.numel() == 0 or all(bool(torch.isfinite(end)) for end in x.detach().aminmax())


def need_finite(W: torch.Tensor) -> None:
    """Raise InputError naming the first element of W [rows, cols] that is NaN or infinite."""
    if not all_finite(W):
        judge_finite(*finite_facts(W), W.shape)


def finite_facts(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat index and value [1] of the first element that is not finite (or just of the first);
    nothing waits for the device. judge_finite reads them. W may be empty.
    """
    if not W.numel():
        return W.new_zeros(1, dtype=torch.int64), W.new_zeros(1)
    place = (~torch.isfinite(W)).view(torch.uint8).flatten().argmax().view(1)
    return place, W.flatten().index_select(0, place)


def judge_finite(place: torch.Tensor, value: torch.Tensor, shape: torch.Size) -> None:
    """Raise InputError when finite_facts of a W of that shape say so."""
    if not all_finite(value):
        row, col = divmod(int(place), shape[1])
        raise InputError(f"W[{row}, {col}] of {list(shape)} is {value.item()}, not finite")
