"""Bytes of the weight files by part of the model, and what else the same bytes would buy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..compress.packing import Packing
from ..compress.plan import make_plan
from ..compress.settings import from_recipe
from ..errors import DistayaError
from ..recipe import Recipe

PARTS = ("embedding", "head", "attention", "mlp", "norms", "other")
_CLOSE = 0.03  # a rival takes at most this share of bytes more
_BITS, _GROUPS, _PATTERNS = (3, 4, 8, None), (32, 64, 128, 0), (None, "50%", "2:4")
_MOST_RIVALS = 6


@dataclass
class Part:
    """Bytes of one part of the model. weights: numbers it stands for; the rest: bytes of its
    tensors by what they hold, "weights" where they are as the source stores them.
    """

    weights: int = 0
    bytes: int = 0
    holds: dict[str, int] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / max(1, self.weights)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "bits_per_weight": self.bits_per_weight}


def parts_of(packing: Packing) -> dict[str, Part]:
    """Every part of PARTS that the model has. The sum is what Packing.predicted gives, headers
    apart; codes of a bitmask are the most they can be, see there.
    """
    found: dict[str, Part] = {}
    for name, entry in packing.checkpoint.entries.items():
        module = name.removesuffix(".weight")
        part = found.setdefault(_part(packing, name), Part())
        scheme = packing.planned.get(module)
        numbers = math.prod(entry.shape)
        part.weights += numbers
        if scheme is None or module == name:
            _add(part, "weights", entry.nbytes)
            continue
        whole = packing.bytes_of(module)
        for suffix, (dtype, shape) in scheme.tensors(*entry.shape, packing.dtype).items():
            if shape is not None:
                size = math.prod(shape) * dtype.itemsize
                _add(part, _kind(suffix), size)
                whole -= size
        if whole:
            _add(part, "codes", whole)  # of kept weights alone: their number is not a shape
    return {name: found[name] for name in PARTS if name in found}


def _add(part: Part, kind: str, size: int) -> None:
    part.bytes += size
    part.holds[kind] = part.holds.get(kind, 0) + size


def _kind(suffix: str) -> str:
    for kind in ("scale", "zero", "mask", "shape"):
        if kind in suffix:
            return {"scale": "scales", "zero": "zeros", "mask": "masks", "shape": "shapes"}[kind]
    return "codes"


def _part(packing: Packing, name: str) -> str:
    architecture = packing.checkpoint.architecture
    if name.startswith(f"{architecture.embed}."):
        return "embedding"
    if name.startswith(f"{architecture.head}."):
        return "head"
    if "norm" in name.rpartition(".")[0].rpartition(".")[2]:
        return "norms"
    if not name.startswith(f"{architecture.layers}."):
        return "other"
    return "mlp" if ".mlp." in name else "attention"


# ---- rivals ----


@dataclass(frozen=True)
class Rival:
    """Another recipe: its bytes over those planned, and what it spends them on. kept: share of
    the Linears' weights that are not pruned; bits: of each of them, 16 = not rounded. Which of two
    is the better model is not known before both are measured.
    """

    recipe: str
    bytes: int
    ratio: float
    kept: float
    bits: int
    group: int | None
    embed_bits: int

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def rivals(recipe: Recipe, packing: Packing, source_layers: int, planned: int) -> list[Rival]:
    """Recipes of at most _CLOSE more bytes that keep more weights or more bits of each than this
    one, largest first. None for a recipe with rules for modules, of method dass or dense.
    """
    if recipe.modules or recipe.method in ("dass", "dense"):
        return []
    own = _spent(recipe)
    found: list[Rival] = []
    for other in _others(recipe):
        try:
            plan = make_plan(other, packing.checkpoint, source_layers)
            size = Packing(other, plan, packing.checkpoint).predicted()
        except DistayaError:  # groups that do not divide, patterns that do not fit
            continue
        spent = _spent(other)
        more = spent != own and any(a > b for a, b in zip(spent, own, strict=True))
        if size <= planned * (1 + _CLOSE) and more:
            group = other.group if other.bits else None
            embed = other.embed_bits or 8 * packing.checkpoint.dtype.itemsize
            rival = Rival(_words(other), size, size / planned, spent[0], spent[1], group, embed)
            found.append(rival)
    found.sort(key=lambda r: (-r.kept * r.bits, -r.bytes))
    seen: dict[tuple[float, int, int], Rival] = {}
    for rival in found:
        seen.setdefault((rival.kept, rival.bits, rival.embed_bits), rival)
    return [r for r in seen.values() if not _beaten(r, seen.values())][:_MOST_RIVALS]


def _beaten(rival: Rival, others: Iterable[Rival]) -> bool:
    """Whether another keeps as much everywhere and more somewhere."""
    mine = (rival.kept, rival.bits, rival.embed_bits)
    return any(
        theirs != mine and all(a >= b for a, b in zip(theirs, mine, strict=True))
        for theirs in ((o.kept, o.bits, o.embed_bits) for o in others)
    )


def _spent(recipe: Recipe) -> tuple[float, int]:
    kept = 1 - (recipe.sparsity or 0.0)
    if recipe.nm_pair is not None:
        kept = recipe.nm_pair[0] / recipe.nm_pair[1]
    return kept, recipe.bits or 16


def _others(recipe: Recipe) -> Iterable[Recipe]:
    known = from_recipe(recipe).statistic == "hessian"
    for bits in _BITS:
        for pattern in _PATTERNS:
            for group in _GROUPS if bits else (recipe.group,):
                for embed in (None, 8):
                    method = recipe.method
                    if pattern is None:
                        method = ("gptq" if known else "rtn") if bits else "dense"
                    elif method in ("gptq", "rtn"):
                        method = "sparsegpt" if known else "magnitude"
                    fields = recipe.model_dump(exclude={"sparsity", "nm", "heal", "evaluate"})
                    fields |= {"bits": bits, "group": group, "embed_bits": embed, "method": method}
                    fields |= {"format": "auto", "drop_layers": [], "dass": None, "permute": False}
                    fields["quality"] = None
                    if pattern is not None:
                        fields["nm" if ":" in pattern else "sparsity"] = (
                            pattern if ":" in pattern else 0.5
                        )
                    try:
                        yield Recipe(**fields)
                    except DistayaError:
                        continue


def _words(recipe: Recipe) -> str:
    words = [recipe.method]
    if recipe.nm or recipe.sparsity:
        words.append(recipe.nm or f"{100 * (recipe.sparsity or 0):g} %")
    if recipe.bits:
        words.append(f"{recipe.bits} bits in groups of {recipe.group or 'a row'}")
    if recipe.embed_bits:
        words.append(f"embedding in {recipe.embed_bits} bits")
    return ", ".join(words)
