"""Leaving out decoder layers: what the configuration of the shallower model says, and a model in
memory without them.

Layers that stay keep their kind (sliding or full attention), whatever their new number is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import UsageError
from .architecture import Architecture

_NOT_BY_LAYER = ("architectures", "keys_to_ignore_at_inference")
_NOT_BY_LAYER_ENDS = ("_id", "_ids", "_tokens")  # eos_token_id: [1, 2] in a model of two layers
_PERIODS = ("sliding_window_pattern", "_sliding_window_pattern")  # every n-th layer is full


def layers_left(count: int, dropped: Sequence[int]) -> tuple[int, ...]:
    """Indices of the layers that stay of `count`. UsageError for one that is not there, one that is
    named twice, and when none stays.
    """
    for index in dropped:
        if not 0 <= index < count:
            raise UsageError(
                f"drop_layers names layer {index}; the model has {count}, from 0 to {count - 1}"
            )
        if list(dropped).count(index) > 1:
            raise UsageError(f"drop_layers names layer {index} twice")
    if len(dropped) == count:
        raise UsageError(f"drop_layers names all {count} layers; at least one must stay")
    return tuple(index for index in range(count) if index not in dropped)


def cut_config(config: Any, left: Sequence[int]) -> Any:
    """A copy of a transformers configuration for the layers that stay."""
    config = copy.deepcopy(config)
    for key, value in _changes(vars(config), config.num_hidden_layers, left).items():
        if value is None:
            delattr(config, key)
        else:
            setattr(config, key, value)
    return config


def cut_json(raw: Mapping[str, Any], config: Any, left: Sequence[int]) -> dict[str, Any]:
    """config.json for the layers that stay; raw is what the file says and config what transformers
    makes of it: kinds of layers that follow from their numbers are written out.
    """
    raw = dict(raw)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        raw["layer_types"] = list(kinds)
    for key, value in _changes(raw, config.num_hidden_layers, left).items():
        if value is None:
            del raw[key]
        else:
            raw[key] = value
    return raw


def remove_layers(model: Any, architecture: Architecture, left: Sequence[int]) -> None:
    """Make a causal language model of transformers, with or without weights, one of these layers
    only, in place.
    """
    cut = cut_config(model.config, left)
    path, _, name = architecture.layers.rpartition(".")
    parent = model.get_submodule(path)
    stay = nn.ModuleList([getattr(parent, name)[index] for index in left])
    for index, layer in enumerate(stay):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # its place in a cache
    setattr(parent, name, stay)
    for config in {id(m.config): m.config for m in (model, parent)}.values():
        vars(config).clear()
        vars(config).update(vars(cut))


def irregular(config: Any, left: Sequence[int]) -> str | None:
    """A sentence when full attention stood at every n-th layer and no longer does among the layers
    that stay, as readers that count instead of looking at layer_types assume; None when it does.
    """
    kinds = list(getattr(config, "layer_types", None) or [])
    full = [i + 1 for i, kind in enumerate(kinds) if kind == "full_attention"]
    if len(set(kinds)) < 2 or not full:
        return None
    period = full[0]
    if full != list(range(period, len(kinds) + 1, period)):
        return None  # it never was
    kept = [kinds[index] for index in left]
    places = [i + 1 for i, kind in enumerate(kept) if kind == "full_attention"]
    off = [place for place in places if place % period]
    want = len(kept) // period
    if not off and len(places) == want:
        return None
    return (
        f"full attention stood at every layer whose number, from 1, divides by {period}; of the "
        f"{len(kept)} layers that stay {len(places)} have it (at {_some(places)}) where that rule "
        f"gives {want}: transformers and this package follow layer_types, but readers that count "
        f"layers, such as llama.cpp, would run them wrongly"
    )


def _some(places: Sequence[int]) -> str:
    return ", ".join(map(str, places[:8])) + (", ..." if len(places) > 8 else "") or "none"


def _changes(fields: Mapping[str, Any], count: int, left: Sequence[int]) -> dict[str, Any]:
    """Fields of a configuration of `count` layers that differ for those left; None: it goes."""
    changed: dict[str, Any] = {"num_hidden_layers": len(left)}
    for key, value in fields.items():
        if _by_layer(key, value, count):
            changed[key] = [value[index] for index in left]
    first = fields.get("max_window_layers")  # layers from here on slide (Qwen)
    if type(first) is int:
        changed["max_window_layers"] = first - sum(i not in left for i in range(min(first, count)))
    kinds = changed.get("layer_types")
    for key in _PERIODS:
        period = fields.get(key)
        if type(period) is int and kinds is not None and kinds != _periodic(period, len(left)):
            changed[key] = None  # layer_types says it
    return changed


def _by_layer(key: str, value: Any, count: int) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != count:
        return False
    return key not in _NOT_BY_LAYER and not key.endswith(_NOT_BY_LAYER_ENDS)


def _periodic(period: int, count: int) -> list[str]:
    return [
        "sliding_attention" if period and (i + 1) % period else "full_attention"
        for i in range(count)
    ]
