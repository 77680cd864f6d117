"""Allocations of one search: their bytes, their predicted and their measured KL."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .choices import Choice, Costs
from .objective import Dropped, UnitTable
from .sensitivity import Sensitivities, Unit
from .variants import Variants
from .whole import Windows, by_language, measure


@dataclass(frozen=True)
class Candidate:
    """A choice for every unit; layers left out. bytes are in the terms of the budget."""

    picks: tuple[int, ...]
    dropped: frozenset[int]
    bytes: int


class Space:
    """All candidates: the units in order, their bytes under the budget's terms.

    whole_files: the budget is that of the weight files, headers and all; else of the Linears alone.
    """

    def __init__(self, costs: Costs, units: list[Unit], *, whole_files: bool, drop: bool):
        self.costs, self.units, self.whole_files, self.drop = costs, units, whole_files, drop
        self.layers = sorted({unit.layer for unit in units})
        self.sizes = [
            np.array([self._bytes(unit, choice, whole_files) for choice in unit.choices], np.int64)
            for unit in units
        ]
        prefix = costs.checkpoint.architecture.layers
        self.rest = {i: costs.rest(f"{prefix}.{i}") if whole_files else 0 for i in self.layers}
        self.fixed = costs.rest(None) + _HEADER if whole_files else 0
        self.weights = sum(rows * columns for rows, columns in map(costs.shape, costs.names))

    def _bytes(self, unit: Unit, choice: Choice, header: bool) -> int:
        return sum(self.costs.linear(name, choice, header) for name in unit.names)

    def of_layer(self, layer: int) -> list[int]:
        """Numbers of the units of a layer."""
        return [i for i, unit in enumerate(self.units) if unit.layer == layer]

    def candidate(self, picks: tuple[int, ...], dropped: frozenset[int]) -> Candidate:
        total = self.fixed + sum(self.rest[i] for i in self.layers if i not in dropped)
        for size, pick, unit in zip(self.sizes, picks, self.units, strict=True):
            total += 0 if unit.layer in dropped else int(size[pick])
        return Candidate(picks, dropped, total)

    def uniform(self, choice: Choice) -> Candidate | None:
        """The same choice everywhere, None when some matrix cannot have it."""
        if any(choice not in unit.choices for unit in self.units):
            return None
        picks = tuple(unit.choices.index(choice) for unit in self.units)
        return self.candidate(picks, frozenset())

    def from_parts(self, parts: list[list[int] | None]) -> Candidate:
        """The candidate of allocate's picks; units of dropped layers get their first choice."""
        picks: list[int] = []
        for layer, taken in zip(self.layers, parts, strict=True):
            picks += taken if taken is not None else [0] * len(self.of_layer(layer))
        gone = frozenset(
            layer for layer, taken in zip(self.layers, parts, strict=True) if taken is None
        )
        return self.candidate(tuple(picks), gone)

    def tables(
        self, found: Sensitivities
    ) -> tuple[list[list[UnitTable]], list[int], list[Dropped]]:
        """What objective.best_allocation takes."""
        units = [
            [(self.sizes[i], found.kl[self.units[i]]) for i in self.of_layer(layer)]
            for layer in self.layers
        ]
        # The first layer stays: it reads the embedding, and a model needs one.
        may = [self.drop and i != self.layers[0] for i in self.layers]
        dropped = [
            (0, found.dropped[i]) if can else None for i, can in zip(self.layers, may, strict=True)
        ]
        return units, [self.rest[i] for i in self.layers], dropped

    def predicted(self, found: Sensitivities, candidate: Candidate) -> np.ndarray:
        """KL per language, were those of single changes to add up."""
        total = np.zeros(len(next(iter(found.kl.values()))[0]))
        if found.ends is not None:
            total += found.ends
        for unit, pick in zip(self.units, candidate.picks, strict=True):
            if unit.layer not in candidate.dropped:
                total += found.kl[unit][pick]
        return total + sum(found.dropped[layer] for layer in candidate.dropped)

    def file_bytes(self, candidate: Candidate) -> int:
        """Most bytes of the weight files, whatever the terms of the budget."""
        return self._in_terms(candidate, whole_files=True)

    def linear_bytes(self, candidate: Candidate) -> int:
        """Most bytes of the Linears that stay."""
        return self._in_terms(candidate, whole_files=False)

    def _in_terms(self, candidate: Candidate, *, whole_files: bool) -> int:
        if whole_files == self.whole_files:
            return candidate.bytes
        other = Space(self.costs, self.units, whole_files=whole_files, drop=self.drop)
        return other.candidate(candidate.picks, candidate.dropped).bytes

    def bits_per_weight(self, candidate: Candidate) -> float:
        """Bits of the Linears that stay per weight of those of the source model."""
        return 8 * self.linear_bytes(candidate) / self.weights


# The length of a header, its braces, what it says of the format, and its padding.
_HEADER = 96


class Judge:
    """Measures candidates as assembled from the stored variants; to be called by all ranks."""

    def __init__(self, space: Space, variants: Variants):
        self.space, self.variants = space, variants

    def __call__(self, candidate: Candidate, windows: Windows, keep: bool = False) -> np.ndarray:
        """Mean KL(dense || candidate) per window, float64. keep: every rank keeps its variants."""

        def layer_weights(layer: int) -> dict[str, torch.Tensor]:
            return {
                name: self.variants.lent(name, unit.choices[pick], keep)
                for unit, pick in zip(self.space.units, candidate.picks, strict=True)
                if unit.layer == layer and not unit.choices[pick].dense
                for name in unit.names
            }

        each = {layer: (lambda layer=layer: layer_weights(layer)) for layer in self.space.layers}
        return measure(windows, each, candidate.dropped)

    def languages(self, candidate: Candidate, windows: Windows) -> np.ndarray:
        """The same per language. Candidates that are compared have most variants in common, and the
        ranks keep them.
        """
        return by_language(windows, self(candidate, windows, keep=True))
