"""Policy: what the recipe means for one stack of matrices. No tensor is touched here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError

# What each method must know about the inputs of a Linear.
_STATISTIC = {
    "sparsegpt": "hessian",
    "gptq": "hessian",
    "wanda": "norms",
    "ria": "norms",
    "magnitude": None,
    "rtn": None,
    "dense": None,
}
_PRUNES = ("sparsegpt", "wanda", "ria", "magnitude")
_MUST_QUANTISE = ("gptq", "rtn")


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

    @property
    def statistic(self) -> str | None:
        """'hessian', 'norms' or None: what must be gathered from calibration tokens."""
        return _STATISTIC[self.method]


def from_recipe(recipe: Any) -> Settings:
    """Settings of a recipe. UsageError when method and numbers do not belong together."""
    method = recipe.method
    if method not in _STATISTIC:
        raise UsageError(f"method {method!r} is unknown; one of {', '.join(_STATISTIC)} is needed")
    nm = _parse_nm(recipe.nm) if recipe.nm else None
    if recipe.sparsity is not None and nm is not None:
        raise UsageError(
            f"give a sparsity ({recipe.sparsity}) or a pattern ({recipe.nm}), not both"
        )
    prunes = recipe.sparsity is not None or nm is not None
    if method in _PRUNES and not prunes:
        raise UsageError(f"method {method} needs a sparsity such as 0.5 or a pattern such as 2:4")
    if method not in _PRUNES and prunes:
        raise UsageError(f"method {method} does not prune; take the sparsity away or use sparsegpt")
    if recipe.sparsity is not None and not 0.0 <= recipe.sparsity < 1.0:
        raise UsageError(f"sparsity must lie in [0, 1), not {recipe.sparsity}")
    if method in _MUST_QUANTISE and recipe.bits is None:
        raise UsageError(f"method {method} needs a number of bits from 2 to 8")
    if method == "dense" and recipe.bits is not None:
        raise UsageError("method dense changes nothing; use rtn or gptq to quantise")
    return Settings(
        method=method,
        sparsity=recipe.sparsity,
        nm=nm,
        bits=recipe.bits,
        group=recipe.group,
        symmetric=recipe.symmetric,
        scale=recipe.scale,
        order=recipe.order,
        damp=recipe.damp,
    )


def _parse_nm(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,2}):(\d{1,2})", str(text))
    n, m = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < n < m <= 32:
        raise UsageError(f"pattern {text!r} must be N:M with 0 < N < M <= 32, such as 2:4")
    return n, m


def skipped(patterns: Iterable[str], modules: list[str]) -> set[str]:
    """Full module names that a skip pattern (regular expression, searched) matches.

    UsageError for a pattern that does not compile or matches nothing: a typo must not pass
    silently.
    """
    found: set[str] = set()
    for pattern in patterns:
        try:
            hits = {name for name in modules if re.search(pattern, name)}
        except re.error as error:
            raise UsageError(
                f"skip pattern {pattern!r} is no regular expression: {error}"
            ) from error
        if not hits:
            raise UsageError(f"skip pattern {pattern!r} matches none of the {len(modules)} Linears")
        found |= hits
    return found


def parse_bytes(text: str | int | None) -> int | None:
    """'8GiB', '500MB', '2g' or a number of bytes; None stays None (no limit)."""
    if text is None or isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if not match:
        raise UsageError(f"memory size {text!r} is not understood; write it like 8GiB or 500MB")
    base = 1000 if (match[2] and not match[3] and text.lower().rstrip().endswith("b")) else 1024
    return int(float(match[1]) * base ** " kmgt".index(match[2] or " "))
