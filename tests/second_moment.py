"""How far H and G may be from sum_t w_t x_t x_t^T and y_t x_t^T: the bounds of hessian.h."""

import torch

from distaya_ext.ops import hessian as room

RUN, CUDA_RUN = 256, 32  # kRun, kCudaRun


def factor(X: torch.Tensor, weights: torch.Tensor | None) -> float:
    """(run + runs + 6) u, the worst case of the promoted fp32 sums."""
    groups = 1 if weights is None else len(weights.unique())
    return (RUN + len(X) / RUN + groups + 1 + 6) * 2.0**-24


def cuda_factor(X: torch.Tensor, weights: torch.Tensor | None) -> float:
    """The same on CUDA: tensor cores may cut, and runs end where weights change."""
    if X.dtype == torch.float32:
        return factor(X, weights)
    some = torch.ones(1) if weights is None else weights[weights != 0]
    changes = int((some[1:] != some[:-1]).sum())
    return (2 * CUDA_RUN + len(X) / CUDA_RUN + changes + 1 + 4) * 2.0**-24


def bound(H: torch.Tensor, X: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Of hessian_ on the CPU and of column_sq_: the factor times |H| + sum w |x_i||x_j|."""
    return factor(X, weights) * room.reference(H.abs(), X.abs(), weights)


def cuda_bound(H: torch.Tensor, X: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Of hessian_ on CUDA."""
    return cuda_factor(X, weights) * room.reference(H.abs(), X.abs(), weights)


def cross_bound(
    G: torch.Tensor, Y: torch.Tensor, X: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """Of cross_ on the CPU."""
    return factor(X, weights) * room.cross_reference(G.abs(), Y.abs(), X.abs(), weights)


def cuda_cross_bound(
    G: torch.Tensor, Y: torch.Tensor, X: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """Of cross_ on CUDA."""
    return cuda_factor(X, weights) * room.cross_reference(G.abs(), Y.abs(), X.abs(), weights)
