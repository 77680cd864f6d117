"""Second moments of a layer's inputs: H = sum_t w_t x_t x_t^T, its diagonal, and G of two inputs.

H is what SparseGPT (arXiv 2301.00774, section 3) and GPTQ (arXiv 2210.17323, section 2) call the
Hessian, without their factor 2, which changes no mask and no code. Only the upper triangle is
computed. Sums are fp32, promoted every 256 tokens, every 32 for 16-bit X on CUDA, where tensor
cores make them: csrc/hessian/hessian.h states the bounds. There a change of weight from one token
to the next costs the time of up to 32 tokens, so keep tokens of one weight together.

G = sum_t w_t y_t x_t^T is the cross moment of two inputs at the same tokens: of one Linear's, say
those that the dense model and the compressed one give it, or of vectors that differ in length, say
what a Linear's block should still add and its input. It is summed as H is, product for product: for
Y = X it equals the symmetrised H to the bit, so G - H is exactly zero where the two inputs agree.

A token weight of 0 leaves the token out exactly, whatever it holds (padding). On the CPU weights
must be finite and >= 0 or the call is refused; on CUDA a raw op does not look, since that would
stall the stream: there a NaN weight gives NaN and a negative one counts as it is. ``Hessian``
checks them on both, on CUDA when the result is asked for. NaN and Inf in X propagate into H, where
the Cholesky factorisation names the column.
"""

import torch
from torch import Tensor

from distaya_ext import _C
from distaya_ext._op import op


@op(mutates=("H",))
def hessian_syrk_(H: Tensor, X: Tensor, weights: Tensor | None) -> None:
    """See hessian_."""
    _C.hessian(H, X, weights)


@op(mutates=("G",))
def hessian_cross_(G: Tensor, Y: Tensor, X: Tensor, weights: Tensor | None) -> None:
    """See cross_."""
    _C.cross(G, Y, X, weights)


@op(mutates=("s",))
def hessian_column_sq_(s: Tensor, X: Tensor, weights: Tensor | None) -> None:
    """See column_sq_."""
    _C.column_sq(s, X, weights)


@op(mutates=("H",))
def hessian_symmetrize_(H: Tensor) -> None:
    """See symmetrize_."""
    _C.symmetrize(H)


def hessian_(H: Tensor, X: Tensor, weights: Tensor | None = None) -> None:
    """Upper triangle of H += sum_t w_t x_t x_t^T; below the diagonal H is left alone.

    H: fp32 [C, C]. X: bf16, fp16 or fp32 [T, C]. weights: fp32 [T], finite and >= 0, or None for
    all 1. All contiguous, on one device. Raises ValueError for anything else.
    """
    hessian_syrk_(H, X, weights)


def cross_(G: Tensor, Y: Tensor, X: Tensor, weights: Tensor | None = None) -> None:
    """G += sum_t w_t y_t x_t^T: element [i, j] gets column i of Y against column j of X.

    G: fp32 [K, C], all of it. Y: [T, K] and X: [T, C], both bf16, fp16 or fp32. weights: fp32 [T],
    finite and >= 0, or None for all 1. All contiguous, on one device. Raises ValueError for
    anything else.
    """
    hessian_cross_(G, Y, X, weights)


def symmetrize_(H: Tensor) -> None:
    """Copy the upper triangle of H, fp32 [C, C] contiguous, onto the lower. Raises ValueError."""
    hessian_symmetrize_(H)


def column_sq_(s: Tensor, X: Tensor, weights: Tensor | None = None) -> None:
    """s_j += sum_t w_t x_tj^2: the diagonal of H alone, all that Wanda (arXiv 2306.11695) needs.

    s: fp32 [C]. X: bf16, fp16 or fp32 [T, C]. weights: fp32 [T], finite and >= 0, or None for all
    1. All contiguous, on one device. Raises ValueError for anything else.
    """
    hessian_column_sq_(s, X, weights)


class _Moment:
    """What a sum over tokens of X [..., columns] is to be divided by."""

    _name = ""  # what errors call it

    def __init__(self, columns: int):
        self._columns = columns
        self._plain = 0  # tokens added without weights
        # fp64 on the device, so that adding weights never waits for it: tokens of weight > 0, sum
        # of weights, number of weights that are negative, NaN or infinite. None: no weights came,
        # and then nothing here waits for the device at all.
        self._counts: Tensor | None = None
        self._finished = False

    @property
    def tokens(self) -> int:
        """Tokens added, those of weight 0 not counted."""
        return self._plain + int(self._checked()[0])

    @property
    def weight(self) -> float:
        """Sum of the weights added; a token without weight counts 1."""
        return self._plain + self._checked()[1]

    def _flat(self, X: Tensor, weights: Tensor | None) -> Tensor:
        """X as [tokens, columns]; refuses what does not fit, and everything after finish()."""
        if self._finished:
            raise ValueError(
                f"this {self._name} was finished and takes no more tokens; make a new one"
            )
        flat = self._flat_tokens(X, "X", self._columns, "columns")
        if weights is not None and weights.shape != X.shape[:-1]:
            raise ValueError(
                f"weights of shape {list(weights.shape)} do not match X of shape {list(X.shape)}"
            )
        return flat

    def _flat_tokens(self, X: Tensor, name: str, columns: int, which: str) -> Tensor:
        """X, called `name`, as [tokens, columns]; `which` says what of the sum they become."""
        if X.ndim == 0 or X.shape[-1] != columns:
            raise ValueError(
                f"{name} of shape {list(X.shape)} must have {columns} columns, as many as the "
                f"{self._name} has {which}"
            )
        return X.detach().reshape(X.shape[:-1].numel(), columns).contiguous()

    @staticmethod
    def _flat_weights(weights: Tensor | None) -> Tensor | None:
        return None if weights is None else weights.detach().reshape(-1).contiguous()

    def _count(self, tokens: int, w: Tensor | None) -> None:
        if w is None:
            self._plain += tokens
            return
        bad = ~((w >= 0) & w.isfinite())
        counts = torch.stack([(w > 0).sum().double(), w.double().sum(), bad.sum().double()])
        self._counts = counts if self._counts is None else self._counts + counts

    def _divisor(self) -> float:
        weight = self.weight
        if not weight > 0:
            raise ValueError(
                f"no token of positive weight was added to the {self._name} of "
                f"{self._columns} columns"
            )
        return weight

    def _checked(self) -> list[float]:
        """The counts, on the host; refuses what the raw op could not refuse on CUDA."""
        if self._counts is None:
            return [0.0, 0.0, 0.0]
        counts = self._counts.tolist()
        if counts[2]:
            raise ValueError(
                f"{int(counts[2])} token weights were negative, NaN or infinite; they must be "
                "finite and not negative"
            )
        return counts


class Hessian(_Moment):
    """Accumulates H over the calibration tokens of one layer input.

    H: fp32 [columns, columns], upper triangle of the sum so far, not divided by anything.
    """

    _name = "Hessian"

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        super().__init__(columns)
        self.H = torch.zeros(columns, columns, dtype=torch.float32, device=device)

    @torch.no_grad()
    def add(self, X: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens X [..., columns] (bf16, fp16 or fp32) with weights fp32 [...] or None = 1.

        X and weights may have any strides (a copy is made where they are not contiguous). Raises
        ValueError after finish(), and as hessian_ does.
        """
        flat, w = self._flat(X, weights), self._flat_weights(weights)
        hessian_(self.H, flat, w)
        self._count(len(flat), w)

    def column_norms(self) -> Tensor:
        """fp32 [columns]: sqrt(H_jj / weight), the root mean square of each input.

        Raises ValueError when no token of positive weight was added.
        """
        diagonal = self.H.diagonal()
        return (diagonal if self._finished else diagonal / self._divisor()).sqrt()

    def finish(self) -> Tensor:
        """The full symmetric H / weight, fp32 [columns, columns], in the memory of the sum.

        Afterwards add() is refused, and ``H`` is that same tensor. Raises ValueError when no token
        of positive weight was added, or a weight was negative, NaN or infinite.
        """
        if not self._finished:
            self.H.div_(self._divisor())
            symmetrize_(self.H)
            self._finished = True
        return self.H


class CrossMoment(_Moment):
    """Accumulates G over the tokens of two inputs, in lock step.

    G: fp32 [rows, columns], the sum so far, not divided by anything.
    """

    _name = "cross moment"

    def __init__(self, rows: int, columns: int, device: torch.device | str = "cpu"):
        super().__init__(columns)
        self.G = torch.zeros(rows, columns, dtype=torch.float32, device=device)

    @torch.no_grad()
    def add(self, Y: Tensor, X: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens Y [..., rows], X [..., columns] with weights fp32 [...] or None = 1.

        Y and X are both bf16, fp16 or fp32, of any strides, as in Hessian.add. Raises ValueError
        after finish(), and as cross_ does.
        """
        x, w = self._flat(X, weights), self._flat_weights(weights)
        y = self._flat_tokens(Y, "Y", len(self.G), "rows")
        if Y.shape[:-1] != X.shape[:-1]:
            raise ValueError(
                f"Y of shape {list(Y.shape)} and X of shape {list(X.shape)} must agree in all but "
                "their last dimension"
            )
        cross_(self.G, y, x, w)
        self._count(len(x), w)

    def finish(self) -> Tensor:
        """G / weight, fp32 [rows, columns], in the memory of the sum.

        Afterwards add() is refused, and ``G`` is that same tensor. Raises ValueError when no token
        of positive weight was added, or a weight was negative, NaN or infinite.
        """
        if not self._finished:
            self.G.div_(self._divisor())
            self._finished = True
        return self.G


def reference(H: Tensor, X: Tensor, weights: Tensor | None = None) -> Tensor:
    """What hessian_ leaves in H, as fp64 [C, C]: plain torch in double precision."""
    x = X.double()
    w = x.new_ones(len(x)) if weights is None else weights.double()
    x = x[w != 0] * w[w != 0].sqrt()[:, None]
    return H.double() + (x.t() @ x).triu()


def cross_reference(G: Tensor, Y: Tensor, X: Tensor, weights: Tensor | None = None) -> Tensor:
    """What cross_ leaves in G, as fp64 [K, C]: plain torch in double precision."""
    y, x = Y.double(), X.double()
    if weights is not None:
        some = weights != 0
        y, x = y[some] * weights[some, None].double(), x[some]
    return G.double() + y.t() @ x
