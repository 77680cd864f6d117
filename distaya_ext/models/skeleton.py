"""A model without weights: transformers' own classes with every parameter on the meta device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..errors import InputError
from .architecture import Architecture


def build_skeleton(config: Any, dtype: torch.dtype, layers: int | None = None) -> nn.Module:
    """Causal language model of the config with meta parameters and real buffers (rotary tables,
    scales).

    Buffers are never stored in checkpoints, so the model's own constructor must compute them;
    parameters are moved to meta as they are registered and take no memory. layers cuts the model to
    its first layers. The result is in eval mode and needs no gradient. Raises InputError for an
    impossible config.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the shapes are those of the dense model
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = list(config.layer_types[:layers])
    hook = register_module_parameter_registration_hook(_to_meta)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RuntimeError,
        ArithmeticError,
        AssertionError,
        ImportError,
    ) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"config.json does not describe a model that can be built: {reason}"
        ) from error
    finally:
        hook.remove()
    return model.requires_grad_(False).eval()


def _to_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> nn.Parameter | None:
    if param is None or param.is_meta:
        return None  # keep as it is (a tied parameter must stay the same object)
    return nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=False)


def is_tied(model: nn.Module, architecture: Architecture) -> bool:
    """Whether the output head is the embedding."""
    head = model.get_submodule(architecture.head)
    return head.weight is model.get_submodule(architecture.embed).weight


def feed_whole(head: nn.Module) -> None:
    """Give a dense head its input with the strides of a tensor made anew.

    The last tokens of a prompt are a slice, and on a CPU torch multiplies a slice with a weight
    that needs no gradient by copying that weight: a second per prompt for 32,000 x 4096, and 18 for
    two prompts and 64,000.
    """
    head.register_forward_pre_hook(_anew)


def _anew(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x = args[0].contiguous()  # does nothing where only sizes of 1 have odd strides
    return x.view(-1, x.shape[-1]).view(x.shape), *args[1:]


def check_table(model: nn.Module, architecture: Architecture) -> None:
    """Refuse a layer whose Linears are not exactly those of the table."""
    expected = set(architecture.linears())
    for index, layer in enumerate(model.get_submodule(architecture.layers)):
        found = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        if found != expected:
            odd = ", ".join(sorted(found ^ expected))
            raise InputError(
                f"layer {index} of this {architecture.model_type} model does not match the "
                f"architecture table; the difference is {odd}"
            )
