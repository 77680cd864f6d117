"""From a candidate to the recipe that compress() executes."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from ..recipe import Recipe
from .candidate import Candidate, Space
from .choices import Choice, untouched


def to_recipe(space: Space, candidate: Candidate, fields: dict[str, Any]) -> Recipe:
    """The recipe of a candidate; fields: what it has in common with every other of the search.

    The choice of most weights becomes the recipe's own, the others are rules. fields["group"] is
    that of choices which name none.
    """
    chosen: dict[str, Choice] = {}
    for unit, pick in zip(space.units, candidate.picks, strict=True):
        if unit.layer not in candidate.dropped:
            chosen |= dict.fromkeys(unit.names, unit.choices[pick])
    if candidate.dropped:
        fields = fields | {"drop_layers": sorted(candidate.dropped)}
    weights: Counter[Choice] = Counter()
    for name, choice in chosen.items():
        rows, columns = space.costs.shape(name)
        weights[choice] += rows * columns
    packed = [choice for choice, _ in weights.most_common() if not choice.dense]
    if not packed:
        return untouched(fields)
    common = packed[0]
    group = fields["group"]
    fields = {**fields, **common.fields()}
    fields["method"] = "sparsegpt" if common.prunes else "gptq"
    rules = []
    for choice in weights:
        if choice == common:
            continue
        # Else it would get the group of the recipe, which is that of another choice.
        said = {"dense": True} if choice.dense else {"group": group, **choice.fields()}
        names = [name for name in chosen if chosen[name] == choice]
        prefix = space.costs.checkpoint.architecture.layers
        rules += [{"match": match, **said} for match in patterns(names, prefix)]
    return Recipe(**fields, format="distaya", **({"modules": rules} if rules else {}))


def patterns(names: list[str], prefix: str) -> list[str]:
    """Regular expressions that match these full names of Linears of layers and no others.

    Linears that are meant in the same layers stand in one pattern.
    """
    layers_of: dict[str, list[int]] = {}
    for name in names:
        layer, _, inner = name.removeprefix(f"{prefix}.").partition(".")
        layers_of.setdefault(inner, []).append(int(layer))
    together: dict[tuple[int, ...], list[str]] = {}
    for inner, layers in layers_of.items():
        together.setdefault(tuple(sorted(layers)), []).append(inner)
    return [
        rf"^{re.escape(prefix)}\.{_any(map(str, layers))}\.{_any(map(re.escape, inners))}$"
        for layers, inners in together.items()
    ]


def _any(parts: Any) -> str:
    parts = list(parts)
    return parts[0] if len(parts) == 1 else f"({'|'.join(parts)})"
