"""How much each language counts in the statistics of a layer, and how much each one has lost.

H = sum_l w_l H_l over languages l, where every token of language l brings the weight w_l. Shares
are what of the whole weight each language gets, w_l T_l / sum_k w_k T_k for T_l tokens; scores and
sweeps know only them, since H is divided by the sum of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..ops.hessian import column_sq_
from ..ranks import Sum
from ..texts import counts
from .calibrate import Calibration

# "worst", chosen on the validation texts of nano-aya: how much a language's share follows its
# error, and the bounds of that share over the equal one.
STRENGTH = 4.0
LEAST, MOST = 0.5, 3.0
FARTHEST = 8.0  # no single layer may count a language's error as farther than this from the mean


@dataclass
class Account:
    """What a layer told of the languages, fp64 [languages]: their shares in its statistics and
    ||h - h'||^2 / ||h||^2 of its output h over their windows, h' as compressed (None: not known).

    inputs: fp64 [2, languages] by the name of a stage's first Linear: see Inputs.summary.
    """

    shares: Tensor
    errors: Tensor | None
    inputs: dict[str, Tensor]


class Mixture:
    """Weights of languages in the statistics; "worst" ones follow the losses layer by layer.

    "worst" is multiplicative: the share of the next layer is the equal one times the geometric
    mean, over the layers so far, of (error / mean error)^STRENGTH. The hidden states of a language
    carry all that earlier layers have lost, and the mean over layers keeps one noisy layer, or a
    deep model, from driving shares to their bounds.

    Nothing here reads a value from the device.
    """

    def __init__(
        self,
        calibration: Calibration,
        weights: str | Mapping[str, float],
        device: torch.device | str = "cpu",
    ):
        self.languages = list(dict.fromkeys(calibration.languages))
        self.worst = weights == "worst"
        self._length = calibration.ids.shape[1]
        self._windows_of = calibration.windows
        place = {lang: at for at, lang in enumerate(self.languages)}
        index = torch.tensor([place[lang] for lang in calibration.languages])
        windows = torch.bincount(index, minlength=len(place)).double()
        self._one_hot = torch.nn.functional.one_hot(index, len(place)).double().to(device)
        each = _token_weights(weights, self.languages, windows)
        # None: every token counts 1, and the statistics take no weights at all.
        self._plain = bool((each == each[0]).all()) and not self.worst
        self._windows = windows.to(device)
        self.tokens = self._windows * self._length
        self._places = index.tolist()
        self.shares = (each * windows / (each * windows).sum()).to(device)
        self._standing = torch.zeros_like(self.shares)  # mean of compared() over the layers so far
        self._layers = 0
        self._sums = torch.zeros(2, len(place), dtype=torch.float64, device=device)
        self._seen = False
        self._inputs: dict[str, Inputs] = {}

    def of_windows(self, chunk: int) -> Tensor | None:
        """fp32 [windows of the chunk]: the weight of each of its tokens, 1 in the mean over all
        tokens. None: all count the same.
        """
        if self._plain:
            return None
        each = self.shares / self._windows * self._windows.sum()
        return (self._rows(chunk) @ each).float()

    def of_tokens(self, chunk: int) -> Tensor | None:
        """fp32 [tokens of the chunk], see of_windows."""
        weights = self.of_windows(chunk)
        return None if weights is None else weights.repeat_interleave(self._length)

    @property
    def weighted(self) -> bool:
        """Whether of_windows gives weights."""
        return not self._plain

    def input_sums(self, where: str, columns: int, device: torch.device) -> list[Sum]:
        """What gather() will add to for a Linear of so many columns."""
        self._inputs[where] = Inputs(self, columns, device)
        return [Sum(self._inputs[where].squares)]

    def output_sums(self) -> list[Sum]:
        """What observe() will add to."""
        self._seen = True
        return [Sum(self._sums)]

    def gather(self, where: str, chunk: int, x: Tensor) -> Tensor | None:
        """Note the inputs x [windows, length, columns] of the Linear `where` on a chunk; what
        of_tokens gives comes back.
        """
        if where not in self._inputs:
            self._inputs[where] = Inputs(self, x.shape[-1], x.device)
        self._inputs[where].add(chunk, x)
        return self.of_tokens(chunk)

    def norms(self, where: str) -> Tensor:
        """Inputs.norms of a Linear of this layer, fp32 [languages, columns]."""
        return self._inputs[where].norms()

    def observe(
        self, chunk: int, compressed: Tensor, dense: Tensor, alive: Tensor | None = None
    ) -> None:
        """Note a layer's output of a chunk, [windows, length, hidden], beside the dense model's.

        alive: bool [windows], those that are not left out; None: all.
        """
        lost = (compressed.float() - dense.float()).square_().flatten(1).sum(1)
        whole = dense.float().square().flatten(1).sum(1)  # in place it would change the stream
        both = torch.stack([lost, whole]).double()
        self._sums += (both if alive is None else both * alive) @ self._rows(chunk)
        self._seen = True

    def close_layer(self) -> Account:
        """The account of the layer whose outputs were noted; the next layer's shares follow."""
        errors = self._sums[0] / self._sums[1].clamp_min(1e-300) if self._seen else None
        inputs = {where: noted.summary() for where, noted in self._inputs.items()}
        account = Account(self.shares.clone(), errors, inputs)
        if self.worst and errors is not None:
            self._layers += 1
            self._standing += (compared(errors) - self._standing) / self._layers
            self.shares = raised(self._standing)
        self._sums.zero_()
        self._seen = False
        self._inputs.clear()
        return account

    def state(self) -> dict[str, Any]:
        """What carries on between layers, as plain values for restore()."""
        shares, standing = self.shares.tolist(), self._standing.tolist()
        return {"shares": shares, "standing": standing, "layers": self._layers}

    def restore(self, state: dict[str, Any]) -> None:
        self.shares = torch.tensor(state["shares"], dtype=torch.float64).to(self.shares)
        self._standing = torch.tensor(state["standing"], dtype=torch.float64).to(self._standing)
        self._layers = state["layers"]

    def places(self, chunk: int) -> list[int]:
        """Where in languages the language of each window of the chunk stands."""
        return self._places[self._windows_of(chunk)]

    def _rows(self, chunk: int) -> Tensor:
        return self._one_hot[self._windows_of(chunk)]


class Inputs:
    """Squares of the inputs of one stage by language: the diagonals of all H_l.

    squares: fp32 [languages, columns], sums over the tokens of a language, each counted once.
    """

    def __init__(self, mixture: Mixture, columns: int, device: torch.device | str):
        self._mixture = mixture
        shape = len(mixture.languages), columns
        self.squares = torch.zeros(shape, dtype=torch.float32, device=device)

    def add(self, chunk: int, x: Tensor) -> None:
        """Note the inputs of a chunk, x [windows, length, columns], bf16, fp16 or fp32."""
        for window, at in zip(x, self._mixture.places(chunk), strict=True):
            column_sq_(self.squares[at], window.contiguous())

    def norms(self) -> Tensor:
        """Root mean square of each column in each language, fp32 [languages, columns]."""
        return (self.squares / self._mixture.tokens[:, None]).float().sqrt_()

    def summary(self) -> Tensor:
        """Per language, fp64 [2, languages]: the root mean square of an input, and the cosine
        between the language's squares and those of the mixture, 1 where it uses the same columns.
        """
        each = self.squares.double() / self._mixture.tokens[:, None]
        mixed = self._mixture.shares @ each
        size = (each.norm(dim=1) * mixed.norm()).clamp_min(1e-300)
        return torch.stack([each.mean(dim=1).sqrt(), each @ mixed / size])


def compared(errors: Tensor) -> Tensor:
    """log(error / mean error) of languages, fp64 [languages], within a factor of FARTHEST."""
    errors = errors.clamp_min(1e-30)
    return (errors / errors.mean()).clamp(1 / FARTHEST, FARTHEST).log()


def raised(standing: Tensor) -> Tensor:
    """Shares of languages, fp64 [languages], that stand at log(error / mean error) so far: equal
    ones times (error / mean error)^STRENGTH, then kept within LEAST to MOST times the equal share.
    """
    equal = 1 / len(standing)
    return bounded((STRENGTH * standing).exp(), LEAST * equal, MOST * equal)


def bounded(shares: Tensor, least: float, most: float) -> Tensor:
    """The shares c * s_l cut to [least, most] with the factor c that makes their sum 1."""
    low = least / shares.max().clamp_min(1e-300)
    high = most / shares.min().clamp_min(1e-300)
    for _ in range(100):
        middle = (low * high).sqrt()
        below = (middle * shares).clamp(least, most).sum() < 1
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (high * shares).clamp(least, most)


def _token_weights(
    weights: str | Mapping[str, float], languages: list[str], windows: Tensor
) -> Tensor:
    """Weight of a token of each language, fp64 [languages], 1 in the mean unless it is the user's.

    windows: fp64 [languages], how many there are.
    """
    if weights == "proportional":
        return torch.ones_like(windows)
    if isinstance(weights, str):  # equal, and where worst begins
        return windows.sum() / (len(windows) * windows)
    strange = sorted(set(weights) - set(languages))
    if strange:
        raise InputError(
            f"there is a weight for {', '.join(strange)}, but the calibration windows are in "
            f"{', '.join(sorted(languages))}"
        )
    each = torch.tensor([weights.get(lang, 1.0) for lang in languages], dtype=torch.float64)
    if not bool(each.any()):
        raise InputError(
            "every language of the calibration windows has weight 0: "
            + counts(dict(zip(languages, windows.tolist(), strict=True)), int)
            + " windows"
        )
    return each
