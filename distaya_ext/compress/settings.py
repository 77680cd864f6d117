"""Policy: what the recipe means for one stack of matrices. No tensor is touched here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..errors import UsageError
from ..recipe import DassSpec, Recipe

# What each method must know about the inputs of a Linear.
_STATISTIC = {
    "sparsegpt": "hessian",
    "gptq": "hessian",
    "wanda": "norms",
    "ria": "norms",
    "dass": "norms",
    "magnitude": None,
    "rtn": None,
    "dense": None,
}


@dataclass(frozen=True)
class Settings:
    """One method with its numbers. nm = (kept, of); bits None = dense; group 0 = whole row."""

    method: str
    sparsity: float | None
    nm: tuple[int, int] | None
    bits: int | None
    group: int
    symmetric: bool
    scale: str
    order: str
    damp: float
    scale_dtype: torch.dtype = torch.float32  # what scales are rounded to before they are used
    static: bool = False  # grids from the dense weights, in the order of the columns
    quality: str = "plain"  # or default or high, see Recipe
    bias_correction: bool = False
    dass: DassSpec | None = None  # of method dass
    permute: bool = False  # neurons of gated MLPs may change places, for any other method

    @property
    def statistic(self) -> str | None:
        """'hessian', 'norms' or None: what must be gathered from calibration tokens."""
        if self.dass is not None and self.dass.update:
            return "hessian"
        return _STATISTIC[self.method]

    @property
    def aims(self) -> bool:
        """Whether a dense twin is carried along to aim at."""
        return self.statistic == "hessian" and self.quality != "plain"

    @property
    def pattern(self) -> str | None:
        """What is pruned as reports say it: "2:4", "0.5", or None."""
        if self.nm is not None:
            return f"{self.nm[0]}:{self.nm[1]}"
        return None if self.sparsity is None else f"{self.sparsity:g}"


def from_recipe(recipe: Recipe) -> Settings:
    """The part of a recipe (which has checked itself) that the maths needs."""
    return Settings(
        method=recipe.method,
        sparsity=recipe.sparsity,
        nm=recipe.nm_pair,
        bits=recipe.bits,
        group=recipe.group,
        symmetric=bool(recipe.symmetric),
        scale=recipe.scale,
        order=recipe.order,
        damp=recipe.damp,
        quality=recipe.effort,
        bias_correction=recipe.bias_correction,
        dass=recipe.dass,
        permute=recipe.permute,
    )


def skipped(patterns: Iterable[str], modules: list[str]) -> set[str]:
    """Full module names that a skip pattern (regular expression, searched) matches.

    UsageError for a pattern that matches nothing: a typo must not pass silently.
    """
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in modules if re.search(pattern, name)}
        if not hits:
            raise UsageError(f"skip pattern {pattern!r} matches none of the {len(modules)} Linears")
        found |= hits
    return found
