"""Modules and parameters of a model, as training chooses among them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..runtime.modules import Packed, PackedEmbedding, PackedHead
from . import masters, scales
from .learned import LowRank, is_pruned
from .spec import TrainSpec


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """named_modules that does not look into layers with LoRA; they have the name of what they
    replaced.
    """
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        yield name, module
        if not is_lora(module):
            children = [
                (f"{name}.{child}" if name else child, each)
                for child, each in module.named_children()
                if child != "parametrizations"
            ]
            waiting += reversed(children)


def weights(model: nn.Module) -> int:
    """Weights of a model: packed matrices and parameters, what LoRA and scales add not counted."""
    packed = 0
    for module in model.modules():
        if isinstance(module, Packed):
            packed += module.rows * module.cols
        elif isinstance(module, scales.ScaledLinear):
            packed += module.out_features * module.in_features
    added = (".lora_", scales.PARAMETER)
    named = dict(model.named_parameters())
    return packed + sum(p.numel() for n, p in named.items() if not any(a in n for a in added))


def is_lora(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


def low_rank_of(layer: Any) -> LowRank:
    """What LoRA learnt: float32 where it will be merged, else in the dtype it is stored in."""
    from .lora import LoraBeside, stored_dtype

    (name,) = layer.lora_A.keys()
    dtype = stored_dtype(layer) if isinstance(layer, LoraBeside) else torch.float32
    A, B = (part[name].weight.detach().to("cpu", dtype) for part in (layer.lora_A, layer.lora_B))
    return LowRank(A, B, float(layer.lora_alpha[name]))


def targeted(model: Any, spec: TrainSpec, name: str, module: nn.Module) -> bool:
    """Whether LoRA goes beside this Linear. UsageError for one that is meant and cannot have it."""
    head = model.get_output_embeddings()
    if not spec.targets:
        return module is not head
    if not any(re.search(pattern, name) for pattern in spec.targets):
        return False
    base = getattr(module, "base_layer", module)
    embedding = model.get_input_embeddings()
    if module is head and getattr(base, "weight", 0) is getattr(embedding, "weight", 1):
        raise UsageError(
            f"{name} is tied to the embedding, so LoRA cannot be merged into it alone; train the "
            "embeddings instead (also: embeddings)"
        )
    return True


Choice = tuple[str, nn.Module, str]  # name of the module, the module, the name of its parameter


def norms(model: nn.Module) -> list[Choice]:
    """Parameters of norms: what belongs to neither a matrix nor LoRA."""
    others = (nn.Linear, nn.Embedding, Packed, PackedHead, scales.ScaledLinear)
    return [
        (name, module, which)
        for name, module in plain_modules(model)
        if not isinstance(module, others) and not is_lora(module)
        for which, _ in module.named_parameters(recurse=False)
    ]


def embedding(model: Any) -> list[Choice]:
    """The dense embedding, and the head where it is tied to it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, PackedEmbedding):
        raise UsageError("the embedding is quantised, so it cannot learn")
    names = {id(module): name for name, module in plain_modules(model)}
    found = [(names[id(embedding)], embedding, "weight")]
    if getattr(head, "weight", None) is embedding.weight:
        found.append((names[id(head)], head, "weight"))
    return found


def learn(model: nn.Module, chosen: list[Choice]) -> None:
    """Make the parameters learn in float32; those of pruned matrices keep their zeros."""
    shared: dict[int, nn.Parameter] = {}
    for _, module, which in chosen:
        before = getattr(module, which)
        keep = isinstance(module, nn.Linear) and which == "weight" and is_pruned(before)
        shared[id(before)] = masters.master(module, which, shared.get(id(before)), keep)


def inside(name: str, module: nn.Module) -> str:
    return f"{name}.base_layer" if is_lora(module) else name
