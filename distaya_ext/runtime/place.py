"""Which modules of a model are packed, and what a folder must hold for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checkpoint.entry import some
from ..errors import InputError
from .modules import Packed, PackedEmbedding, PackedHead, PackedLinear

if TYPE_CHECKING:
    from ..checkpoint import Entry
    from ..formats import Scheme


def place(model: Any, scheme: Scheme, dtype: torch.dtype) -> dict[str, Packed]:
    """Put empty packed modules where the scheme says so; returns them by the name in the folder.

    model is a causal language model of transformers (or its base model), on the meta device or with
    weights, which are dropped. A head that is tied to a packed embedding shares its buffer.
    InputError when the scheme names a module that the model has not.
    """
    above = prefix(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = tied_names(model)
    found: dict[str, Packed] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | nn.Embedding) or (tied and module is head):
            continue
        rule = scheme.for_module(above + name, is_embedding=isinstance(module, nn.Embedding))
        if rule is None:
            continue
        if isinstance(module, nn.Embedding):
            found[above + name] = packed = PackedEmbedding(
                rule,
                module.num_embeddings,
                module.embedding_dim,
                dtype,
                module.padding_idx,
                getattr(module, "scalar_embed_scale", None),
            )
        else:
            found[above + name] = packed = PackedLinear(
                rule, module.out_features, module.in_features, module.bias
            )
        replace(model, name, packed)
        if tied and module is embedding:
            assert isinstance(packed, PackedEmbedding)
            _tie(model, packed, tied)
    _check_named(scheme, found, above)
    return found


def prefix(model: Any) -> str:
    """What stands before this model's names in a folder: "model." for a model without a head."""
    base = getattr(model, "base_model_prefix", "")
    return "" if not base or hasattr(model, base) else f"{base}."


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put the module at the dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def tied_names(model: Any) -> list[str]:
    """Names of weights that transformers ties to the embedding, as "lm_head.weight"."""
    return list(getattr(model, "all_tied_weights_keys", None) or {})


def _tie(model: Any, packed: PackedEmbedding, tied: list[str]) -> None:
    head = model.get_output_embeddings()
    for name in tied:
        path = name.removesuffix(".weight")
        if model.get_submodule(path) is not head:
            raise InputError(f"the model ties {name} to its embedding, which is not supported")
        replace(model, path, PackedHead(packed, head.bias))
    # From here on there is no weight that transformers could tie.
    model.all_tied_weights_keys = {}
    model._tied_weights_keys = {}


def _check_named(scheme: Scheme, found: Mapping[str, Packed], above: str) -> None:
    """Modules that a config of ours names must exist; a tied head is not named."""
    if scheme.method != "distaya":
        return
    named = [rule.target for rule in scheme.rules if rule.target.startswith(above)]
    if absent := [name for name in named if name not in found]:
        raise InputError(
            f"quantization_config names {some(absent, 'module')}, which the model has not"
        )


def check_held(modules: Mapping[str, Packed], entries: Mapping[str, Entry]) -> set[str]:
    """Compare the headers of a folder with what the modules need; returns the names they need.

    InputError for what is absent, misshapen or of another type, and for a dense weight beside.
    """
    found: dict[str, dict[str, Entry]] = {name: {} for name in modules}
    for full, entry in entries.items():
        name, _, suffix = full.rpartition(".")
        if name in found and suffix != "bias":
            found[name][suffix] = entry
    for name, module in modules.items():
        headers = {suffix: (entry.dtype, entry.shape) for suffix, entry in found[name].items()}
        if "weight" in headers:
            raise InputError(f"{name} is quantised, but the folder holds {name}.weight")
        module.scheme.check(headers, module.rows, module.cols, name)
    return {f"{name}.{suffix}" for name, parts in found.items() for suffix in parts}
