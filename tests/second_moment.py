"""How far H may be from sum_t w_t x_t x_t^T: the bounds of csrc/hessian/hessian.h."""

import torch

from distaya_ext.ops import hessian as room

RUN, CUDA_RUN = 256, 32  # kRun, kCudaRun


def bound(H: torch.Tensor, X: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """(run + runs + 4) u (|H| + sum w |x_i||x_j|), the worst case of the promoted fp32 sums."""
    groups = 1 if weights is None else len(weights.unique())
    factor = RUN + len(X) / RUN + groups + 1 + 4
    return factor * 2.0**-24 * room.reference(H.abs(), X.abs(), weights)


def cuda_bound(H: torch.Tensor, X: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The same for hessian_ on CUDA: tensor cores may cut, and runs end where weights change."""
    if X.dtype == torch.float32:
        return bound(H, X, weights)
    some = torch.ones(1) if weights is None else weights[weights != 0]
    changes = int((some[1:] != some[:-1]).sum())
    factor = 2 * CUDA_RUN + len(X) / CUDA_RUN + changes + 1 + 4
    return factor * 2.0**-24 * room.reference(H.abs(), X.abs(), weights)
