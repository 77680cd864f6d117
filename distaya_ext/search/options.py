"""What a search is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError
from ..recipe import CalibrationSpec, parse_size
from .choices import DEFAULT


@dataclass(frozen=True)
class Options:
    """What is searched for. Exactly one of target_size and bits_per_weight is given.

    target_size      bytes of the weight files, such as "4.2GB"
    bits_per_weight  of the Linears of all decoder layers, scales included, embeddings apart
    choices, weights see choices.parse_choices and objective.parse_weights
    per              "matrix", or "stage": matrices that read the same input get the same choice,
                     which takes fewer measurements
    drop             whole layers may be left out
    search_tokens    tokens for the measurements, over all languages; half of them decide, the
                     other half is for the table
    polish           swaps that are measured after the allocation
    quality          of the recipe; variants are made by the plain sweep whatever it is, since they
                     have to rank choices and are many
    """

    target_size: str | int | None = None
    bits_per_weight: float | None = None
    choices: str = DEFAULT
    weights: str = "worst"
    per: str = "matrix"
    drop: bool = False
    search_tokens: int = 16384
    polish: int = 0
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    group: int = 128
    symmetric: bool | None = None
    embed_bits: int | None = None
    quality: str | None = None
    max_ram: str | None = None

    def __post_init__(self) -> None:
        if (self.target_size is None) == (self.bits_per_weight is None):
            raise UsageError("say how small: --target-size or --bits-per-weight, one of them")
        if self.bits_per_weight is not None and not 0 < self.bits_per_weight <= 64:
            raise UsageError(f"{self.bits_per_weight:g} bits per weight are not between 0 and 64")
        if self.per not in ("matrix", "stage"):
            raise UsageError(f"per {self.per!r} is neither matrix nor stage")
        if self.search_tokens < 2 or self.polish < 0:
            raise UsageError("search_tokens must be at least 2 and polish at least 0")

    def target_bytes(self) -> int | None:
        """The budget of the weight files, None when it is one of the Linears."""
        size = self.target_size
        return parse_size(size) if isinstance(size, str) else size

    def common(self) -> dict[str, Any]:
        """Fields of every recipe of the search."""
        fields: dict[str, Any] = {
            "calibration": self.calibration,
            "group": self.group,
            "symmetric": self.symmetric,
            "quality": self.quality,
            "max_ram": self.max_ram,
        }
        return fields | ({"embed_bits": self.embed_bits} if self.embed_bits else {})
