"""Reversed-order Cholesky H' = R Rᵀ (R upper) of a damped Hessian, and the inverses built on it.

With J the reversal of the order of columns, R = J chol(J H' J) J. The upper factor U with
H'⁻¹ = Uᵀ U, for which SparseGPT (Frantar & Alistarh 2023, §3.3) and GPTQ (Frantar et al. 2022,
§3.3) factor, invert and factor again, is R⁻¹: n³/3 flop for R and as many for U, not 4/3 n³.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distaya_ext import _C
from distaya_ext._op import op
from distaya_ext.errors import InputError, UsageError


@dataclass(frozen=True)
class Factor:
    """R with H + damp · mean_diag · I = R Rᵀ, and what happened on the way.

    R: fp32 [n, n], upper triangular, zeros below. damp: as given, relative. mean_diag: mean of H's
    diagonal. floored: pivots that had to be raised (0 = the equation holds as it stands); the
    first of them in processing order (from the last column to the first) is first_floored, or -1.
    dead: zeros on H's diagonal (inputs that were never active).
    """

    R: Tensor
    damp: float
    floored: int
    first_floored: int
    mean_diag: float
    dead: int = 0


@dataclass(frozen=True)
class LateFactor:
    """A factor that is queued and not waited for. R, damp: as in Factor; H: what was factorised,
    None if overwritten; info, mean: on R's device, see cholesky_ and judge.
    """

    R: Tensor
    damp: float
    info: Tensor
    mean: Tensor
    H: Tensor | None = None

    def read(self) -> Factor:
        """Wait for the device; the Factor. Raises as cholesky does."""
        floored, first, dead, average = judge(self.info, self.mean, len(self.R), self.damp, self.H)
        return Factor(self.R, self.damp, floored, first, average, dead)


def judge(
    info: Tensor, mean: Tensor, n: int, damp: float, H: Tensor | None = None
) -> tuple[int, int, int, float]:
    """floored, first_floored, dead and mean_diag of a factor [n, n], read from info and mean.

    H as in LateFactor. Raises as cholesky does for a NaN, an overflow and a negative mean.
    """
    floored, first, bad, dead = info.tolist()
    average = mean.item()
    if bad >= 0:
        if H is not None and bool(H.triu().isfinite().all()):
            raise InputError(
                f"H ({n} x {n}) is too close to singular for damp {damp:g}: its factor overflowed"
                f" at column {bad}; use a larger damp"
            )
        raise InputError(
            f"H ({n} x {n}) is not finite: NaN or Inf in the row or column of input {bad}; check"
            " the calibration activations"
        )
    if average < 0:
        raise InputError(f"H has a negative mean diagonal ({average:g}): no sum of x xᵀ has that")
    return floored, first, dead, average


@op(mutates=("H", "info", "mean", "work"))
def cholesky_(
    H: Tensor, damp: float, floor: float, info: Tensor, mean: Tensor, work: Tensor
) -> None:
    """In place: H fp32 [n, n] (upper triangle read) becomes R. Never waits for the device.

    info int64 [4]: floored pivots, first floored column or -1, first column found not finite or -1
    (R is then meaningless), dead columns. mean float64 [1]: mean diagonal. work fp32
    [_C.cholesky_work(H)]: scratch.
    """
    _C.cholesky_(H, damp, floor, info, mean, work)


@op(mutates=("U",))
def inverse_factor_(R: Tensor, U: Tensor) -> None:
    """U = R⁻¹ for upper triangular R with a nonzero diagonal; both fp32 [n, n], contiguous."""
    _C.inverse_factor(R, U)


@op(mutates=("out",))
def inverse_(U: Tensor, out: Tensor) -> None:
    """out = Uᵀ U, full and symmetric, for upper triangular U; both fp32 [n, n], contiguous."""
    _C.inverse(U, out)


@op(mutates=("B",))
def cholesky_solve_(B: Tensor, R: Tensor, all_rows: int = 0) -> None:
    """See solve_."""
    _C.solve_(B, R, all_rows)


def cholesky(H: Tensor, damp: float = 0.01, floor: float = 1e-7, overwrite: bool = False) -> Factor:
    """Factor H + damp · mean(diag H) · I = R Rᵀ with R upper triangular.

    H: fp32 [n, n], CPU or CUDA; only its upper triangle is read. overwrite: compute in contiguous
    H's own memory (the returned R is H) instead of a copy. damp, floor: relative to mean(diag H);
    if no column is alive, 1 stands in for the mean.

    A pivot below floor · mean(diag H) is raised to it and counted. The factor is then that of H
    with a locally raised diagonal: R Rᵀ = H' + δ e_j e_jᵀ for such a column j, δ >= 0, up to j's
    couplings with the columns before it, which are dropped: next to so small a pivot they are
    rounding noise (at most √floor of the diagonal if H is positive semidefinite), and dividing by
    it would amplify them from column to column until they overflow. With the usual damp of 0.01 a
    positive semidefinite H never gets there, however singular it is.

    Raises InputError (a ValueError) naming the column where NaN or Inf is met (a finite H whose
    factor overflows is told apart, unless it was overwritten) or if the mean diagonal is negative;
    UsageError for a damp or floor out of range; ValueError for wrong shape, dtype or layout.
    """
    return cholesky_late(H, damp, floor, overwrite).read()


def cholesky_late(
    H: Tensor, damp: float = 0.01, floor: float = 1e-7, overwrite: bool = False
) -> LateFactor:
    """cholesky without waiting for the device: a NaN in H is told when the result is read.

    Raises UsageError and ValueError at once, as cholesky does.
    """
    if not (math.isfinite(damp) and damp >= 0):
        raise UsageError(f"damp must be a finite number >= 0 but is {damp}")
    if not (math.isfinite(floor) and floor > 0):
        raise UsageError(f"floor must be a finite number > 0 but is {floor}")
    R = H if overwrite else H.clone(memory_format=torch.contiguous_format)
    info = torch.empty(4, dtype=torch.int64, device=H.device)
    mean = torch.empty(1, dtype=torch.float64, device=H.device)
    scratch = 0 if H.is_meta else _C.cholesky_work(H)
    work = torch.empty(scratch, dtype=torch.float32, device=H.device)
    cholesky_(R, damp, floor, info, mean, work)
    return LateFactor(R, damp, info, mean, None if overwrite else H)


def inverse_factor(R: Tensor) -> Tensor:
    """U = R⁻¹, upper triangular fp32 [n, n], so that (R Rᵀ)⁻¹ = Uᵀ U.

    U is what SparseGPT and GPTQ call the Cholesky factor of the inverse Hessian. R: fp32 [n, n],
    contiguous; only its upper triangle is read. Raises InputError for a zero,
    NaN or Inf on the diagonal, ValueError for wrong shape, dtype or layout.
    """
    U = torch.empty_like(R)
    inverse_factor_(R, U)
    _check_diagonal(R)
    return U


def _check_diagonal(R: Tensor) -> None:
    if not bool((R.diagonal() != 0).all() & R.diagonal().isfinite().all()):
        raise InputError("R has no inverse: a zero, NaN or Inf stands on its diagonal")


def inverse(R: Tensor) -> Tensor:
    """(R Rᵀ)⁻¹, full and symmetric fp32 [n, n]. R and errors as in inverse_factor."""
    U = inverse_factor(R)
    out = torch.empty_like(U)
    inverse_(U, out)
    return out


def solve_(B: Tensor, R: Tensor, all_rows: int = 0) -> None:
    """In place: B <- B (R Rᵀ)⁻¹ for upper triangular R. Never waits for the device.

    By substitution, so with a residual small beside |B (R Rᵀ)⁻¹| |R| |R|ᵀ (csrc/cholesky) however
    ill-conditioned R is; a zero on R's diagonal gives Inf or NaN. B: fp32 [rows, n]; R: fp32
    [n, n], only its upper triangle is read; both contiguous, on one device, or ValueError.
    all_rows: of the matrix, if B has some of its rows: on CUDA their bits are those of the whole.
    """
    cholesky_solve_(B, R, all_rows)


def solve(B: Tensor, factor: Factor | LateFactor | Tensor) -> Tensor:
    """B (R Rᵀ)⁻¹ = B (H + damp · mean_diag · I)⁻¹, fp32 [rows, n], for R or the factor that has it.

    B: fp32 [rows, n]. A LateFactor is not waited for: read it to learn whether H was finite. A
    bare R is checked: InputError for a zero, NaN or Inf on its diagonal. ValueError as in solve_.
    """
    R = factor if isinstance(factor, Tensor) else factor.R
    X = B.clone(memory_format=torch.contiguous_format)
    solve_(X, R)
    if R is factor:
        _check_diagonal(R)
    return X


def reference(H: Tensor, damp: float = 0.01) -> tuple[Tensor, Tensor]:
    """The textbook route in float64: (R, U) from the upper triangle of H by torch.linalg."""
    A = H.triu().double()
    A = A + A.triu(1).T
    A = A + damp * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype, device=A.device)
    R = torch.linalg.cholesky(A.flip(0, 1)).flip(0, 1)
    inverse_H = torch.cholesky_inverse(torch.linalg.cholesky(A))
    return R, torch.linalg.cholesky(inverse_H, upper=True)


def solve_reference(B: Tensor, R: Tensor) -> Tensor:
    """B (R Rᵀ)⁻¹ in float64 by torch.linalg, from the upper triangle of R."""
    R = R.double().triu()
    X = torch.linalg.solve_triangular(R.T, B.double(), upper=False, left=False)
    return torch.linalg.solve_triangular(R, X, upper=True, left=False)
