"""Which fields of a recipe go together, so that a run which starts can also end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .recipe_chain import check_chain
from .recipe_fields import PACKED_BITS, PRUNING, STANDARD_BITS, SWEEPING

if TYPE_CHECKING:
    from .recipe import Recipe


def check_together(recipe: Recipe) -> None:
    """ValueError, in one sentence, for fields that do not go together."""
    prunes = recipe.sparsity is not None or recipe.nm is not None
    if recipe.sparsity is not None and recipe.nm is not None:
        raise ValueError(f"give sparsity ({recipe.sparsity:g}) or nm ({recipe.nm}), not both")
    if recipe.method in PRUNING and not prunes:
        raise ValueError(
            f"method {recipe.method} prunes: say how much, a share such as 0.5 or a pattern "
            "such as 2:4"
        )
    if recipe.method not in PRUNING and prunes:
        raise ValueError(
            f"method {recipe.method} does not prune, so sparsity and nm must be left out"
        )
    if recipe.method in ("gptq", "rtn") and recipe.bits is None:
        raise ValueError(f"method {recipe.method} quantises: say to how many bits, from 2 to 8")
    if recipe.method == "dense" and recipe.bits is not None:
        raise ValueError(f"method dense changes nothing, so bits ({recipe.bits}) must be left out")
    _dass_fits(recipe)
    if recipe.permute and (recipe.method != "sparsegpt" or recipe.nm is None):
        raise ValueError(
            "permute balances the groups of an N:M pattern for method sparsegpt (and, under "
            "dass, for method dass)"
        )
    updates = recipe.dass is not None and recipe.dass.update
    if recipe.quality not in (None, "plain") and recipe.method not in SWEEPING and not updates:
        raise ValueError(
            f"quality {recipe.quality} is for sparsegpt and gptq; method {recipe.method} has no "
            "sweep"
        )
    if recipe.bias_correction and recipe.method in ("magnitude", "rtn", "dense"):
        raise ValueError(
            f"bias_correction needs the means of inputs, and method {recipe.method} looks at no "
            "texts"
        )
    _rules(recipe)
    _ordered(recipe)
    _storable(recipe)
    check_chain(recipe)


def _dass_fits(recipe: Recipe) -> None:
    """ValueError when the options of dass do not go with the rest."""
    if recipe.dass is None:
        return
    if recipe.method != "dass":
        raise ValueError(f"the options under dass are for method dass, not {recipe.method}")
    if recipe.dass.permute and recipe.nm is None and not recipe.dass.dense_neurons:
        raise ValueError(
            "permute balances the groups of an N:M pattern and gathers dense_neurons; with a "
            "share and no dense neurons there is nothing to permute"
        )


def _rules(recipe: Recipe) -> None:
    """ValueError for rules that the method has no sweep for."""
    if recipe.modules and recipe.method not in SWEEPING:
        raise ValueError(
            f"modules (rules for some Linears) are for {' and '.join(SWEEPING)}, which sweep; "
            f"method {recipe.method} does not"
        )


def _ordered(recipe: Recipe) -> None:
    """ValueError for an order that does not go with what is pruned, here or by a rule."""
    if recipe.order == "natural":
        return
    if recipe.method not in SWEEPING:
        raise ValueError(
            f"order {recipe.order} is for {' and '.join(SWEEPING)}; method {recipe.method} has no "
            "sweep"
        )
    ruled = [(f"rule {i} of modules: ", r) for i, r in enumerate(recipe.modules, 1)]
    for where, part in [("", recipe), *((w, r) for w, r in ruled if not r.dense)]:
        if recipe.order == "activation" and part.nm is not None:
            raise ValueError(f"{where}order activation is not for an N:M pattern: {part.nm}")
        if recipe.order == "group" and part.nm is None:
            raise ValueError(f"{where}order group is for an N:M pattern such as 2:4")
        if recipe.order == "block" and not part.sparsity:
            raise ValueError(f"{where}order block is for a share of the weights such as 0.5")


def _storable(recipe: Recipe) -> None:
    """ValueError when the format cannot hold what the recipe makes."""
    if recipe.embed_bits is not None and recipe.format in ("dense", "pack-quantized"):
        raise ValueError(
            f"format {recipe.format} cannot hold an int8 embedding (embed_bits); use distaya"
        )
    packs = recipe.format in ("pack-quantized", "distaya") or recipe.embed_bits is not None
    allowed = STANDARD_BITS if recipe.format == "pack-quantized" else PACKED_BITS
    given = {"": recipe.bits}
    given |= {f"rule {i} of modules: ": rule.bits for i, rule in enumerate(recipe.modules, 1)}
    for where, bits in given.items():
        if packs and bits is not None and bits not in allowed:
            form = "distaya" if recipe.format == "auto" else recipe.format
            raise ValueError(
                f"{where}{bits} bits cannot be packed: format {form} holds "
                f"{', '.join(map(str, allowed))} bits; format dense holds any"
            )
    rounds = any(given.values()) or recipe.embed_bits
    if recipe.format in ("pack-quantized", "distaya") and not rounds:
        raise ValueError(f"format {recipe.format} is for quantised weights: say to how many bits")
