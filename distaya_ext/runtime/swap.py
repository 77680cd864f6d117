"""What can be done to a loaded model: swap stock modules for packed ones, choose, weigh."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.entry import some
from ..errors import UsageError
from ..formats import read_scheme
from ..models.skeleton import feed_whole
from .glu import fuse
from .modules import Packed, PackedHead, PackedLinear
from .place import prefix, replace


def use_kernels(model: Any, *, exact: bool = False) -> Any:
    """Run a model that transformers loaded as compressed-tensors on our kernels; returns it.

    The packed Linears are swapped in place, one by one, and the hook that would make the model
    dense in its first forward is removed. The model cannot be trained afterwards. UsageError in a
    sentence when there is nothing to swap; InputError when the tensors are not what the
    configuration says.
    """
    found = {name: m for name, m in model.named_modules() if _is_compressed(m)}
    if not found:
        raise UsageError(_nothing(model))
    about = getattr(model.config, "quantization_config", None)
    config = about if about is None or isinstance(about, dict) else about.to_dict()
    scheme = read_scheme({"quantization_config": config}, "the model's config")
    if scheme is None:
        raise UsageError("the model holds packed weights and its config has no quantization_config")
    above = prefix(model)
    rules = {name: scheme.for_module(above + name) for name in found}
    if absent := [name for name, rule in rules.items() if rule is None]:
        raise UsageError(
            f"{some(absent, 'module')} hold packed weights that the config does not mention"
        )
    for name, rule in rules.items():
        stock = found.pop(name)
        packed = PackedLinear(rule, stock.out_features, stock.in_features, stock.bias)
        parts = {suffix: getattr(stock, suffix, None) for suffix in packed.tensors()}
        given = {suffix: part for suffix, part in parts.items() if isinstance(part, Tensor)}
        packed.take(given, above + name, stock.weight_packed.device)
        replace(model, name, packed)
        del stock, parts, given
    hook = getattr(model, "ct_decompress_hook", None)
    if hook is not None:
        hook.remove()
        del model.ct_decompress_hook
    fuse(model)
    set_exact(model, exact)
    return freeze(model)


def _is_compressed(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and getattr(module, "weight_packed", None) is not None


def _nothing(model: Any) -> str:
    if any(isinstance(module, Packed) for module in model.modules()):
        return "the model runs on packed weights already; there is nothing to swap"
    method = getattr(model, "quantization_method", None)
    if getattr(method, "value", method) == "compressed-tensors":
        return (
            "the model was made dense already, by its first forward pass or on request; "
            "call use_kernels right after from_pretrained, or load the folder with distaya_ext.load"
        )
    return "the model holds no packed compressed-tensors weights; there is nothing to swap"


def freeze(model: Any) -> Any:
    """No parameter needs a gradient: none could pass the packed modules."""
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        feed_whole(head)
    return model.requires_grad_(False)


def set_exact(model: nn.Module, exact: bool = True) -> int:
    """Choose full-precision (or, again, 8-bit) activations for all packed modules of a model.

    Returns how many there are. Only the CPU makes a difference; a GPU is always exact.
    """
    modules = [m for m in model.modules() if isinstance(m, PackedLinear | PackedHead)]
    for module in modules:
        module.exact = exact
    return len(modules)


def trainable(model: Any, trains: bool = True) -> Any:
    """Let gradients pass the packed modules of a model, or (False) refuse them again; returns it.

    Packed weights themselves never learn: this is for what stands beside and before them, such as
    LoRA, norms and biases. While it is on, every product takes its activations in full precision,
    gated MLPs run part by part, and the backward pass makes one matrix at a time dense.
    """
    for module in model.modules():
        if isinstance(module, Packed):
            module.trains = trains
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and hasattr(quantizer, "trains"):
        quantizer.trains = trains
    return model


def dense_bytes(model: nn.Module) -> int:
    """What resident_bytes would be if all packed weights were dense in the dtype of the model."""
    held = [module for module in model.modules() if isinstance(module, Packed)]
    size = model.dtype.itemsize
    return resident_bytes(model) + sum(m.rows * m.cols * size - m.weights().nbytes for m in held)


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, kernel buffers included, what is shared counted once."""
    seen: dict[tuple[torch.device, int], int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.numel():
            key = (tensor.device, tensor.data_ptr())
            seen[key] = max(seen.get(key, 0), tensor.numel() * tensor.element_size())
    return sum(seen.values())
