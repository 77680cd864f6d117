"""LoRA layers of PEFT beside what PEFT does not know: packed weights and pruned ones.

Imported only where peft is known to be there; see adapter.need_peft.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from ..runtime.gradient import working
from ..runtime.modules import PackedHead, PackedLinear
from .learned import LowRank, is_pruned
from .scales import ScaledLinear

ADAPTER = "default"
_BESIDE = (PackedLinear, PackedHead, ScaledLinear)


class LoraBeside(LoraLinear):
    """y = kernel(x) + alpha / rank B A x: LoRA beside a packed module, never merged into it.

    A and B are rounded to the dtype of the folder's scales, in which they are stored.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not active:
            return super().forward(x, *args, **kwargs)
        y, dtype = self.base_layer(x, *args, **kwargs), stored_dtype(self)
        for name in active:
            A, B = (part[name].weight.to(dtype).float() for part in (self.lora_A, self.lora_B))
            low = nn.functional.linear(nn.functional.linear(x.float(), A), B)
            y = y + (low * self.scaling[name]).to(y.dtype)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(
            "LoRA cannot be merged into quantised weights without quantising anew; it stays beside"
        )


class LoraMasked(LoraLinear):
    """y = (W + mask * alpha / rank B A) x for a pruned W: what is 0 in W stays 0."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to W."""
        return super().get_delta_weight(adapter) * (self.get_base_layer().weight != 0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not active:
            return super().forward(x, *args, **kwargs)
        A = torch.cat([self.lora_A[name].weight for name in active])
        B = torch.cat([self.lora_B[name].weight * self.scaling[name] for name in active], dim=1)
        return _Masked.apply(working(x), base.weight, base.bias, A, B)


class _Masked(torch.autograd.Function):
    """x (W + (W != 0) * B A)^T + b; W + ... is made anew in the backward pass instead of kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, W, A, B)
        ctx.bias = None if bias is None else bias.dtype
        with torch.autocast(x.device.type, enabled=False):
            E = _effective(W, A, B).to(x.dtype)
            return nn.functional.linear(x, E, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B = ctx.saved_tensors
        dx = db = dA = dB = None
        if ctx.needs_input_grad[0]:
            dx = dy @ _effective(W, A, B).to(dy.dtype)
        flat = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[2]:
            db = flat.sum(0, dtype=torch.float32).to(ctx.bias)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            dE = (flat.t() @ x.reshape(-1, x.shape[-1])).float().masked_fill_(W == 0, 0)
            dA, dB = B.float().t() @ dE, dE @ A.float().t()
        return dx, None, db, dA, dB


def _effective(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return (B.float() @ A.float()).masked_fill_(W == 0, 0).add_(W)


def _dense(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> LoraLinear:
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    kind = LoraMasked if is_pruned(base.weight) else LoraLinear
    return kind(target, adapter_name, config=config, **kwargs)


def stored_dtype(layer: Any) -> torch.dtype:
    """The dtype in which what LoRA learns beside a packed module is stored."""
    base = layer.get_base_layer()
    return (base.embedding if isinstance(base, PackedHead) else base).stored


def inject(model: nn.Module, names: Sequence[str], rank: int, alpha: float, seed: int) -> None:
    """Put LoRA of this rank beside the modules of these names, A drawn with the seed, B 0."""
    if not names:
        return
    _place(model, names, dict.fromkeys(names, (rank, alpha)))
    rng = torch.Generator().manual_seed(seed)
    for name in names:
        layer = model.get_submodule(name)
        A, B = parameters(layer)
        # As PEFT draws it, kaiming_uniform with a = sqrt(5): uniform within 1 / sqrt(cols).
        drawn = (2 * torch.rand(A.shape, generator=rng) - 1) / A.shape[1] ** 0.5
        _set(layer, drawn, torch.zeros(B.shape))


def attach(model: nn.Module, held: dict[str, LowRank]) -> None:
    """Put trained LoRA beside the modules; it does not learn."""
    _place(model, list(held), {name: (each.rank, each.alpha) for name, each in held.items()})
    for name, each in held.items():
        _set(model.get_submodule(name), each.A, each.B)


def parameters(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of a layer."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def _place(model: nn.Module, names: Iterable[str], sizes: dict[str, tuple[int, float]]) -> None:
    """PEFT layers at these names, without values yet; nothing of the model learns by that."""
    learns = {id(p) for p in model.parameters() if p.requires_grad}
    first = next(iter(sizes.values()))
    exact = {f"^{re.escape(name)}": size for name, size in sizes.items() if size != first}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=first[0],
        lora_alpha=first[1],
        target_modules=list(names),
        rank_pattern={name: rank for name, (rank, _) in exact.items()},
        alpha_pattern={name: alpha for name, (_, alpha) in exact.items()},
    )
    config._register_custom_module({**dict.fromkeys(_BESIDE, LoraBeside), nn.Linear: _dense})
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # advice about kinds of modules, which are ours
        inject_adapter_in_model(config, model, ADAPTER)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in learns)


def _set(layer: Any, A: Tensor, B: Tensor) -> None:
    """Float32 values on the device of the layer, whatever the dtype of the model."""
    for held, value in ((layer.lora_A, A), (layer.lora_B, B)):
        place = held[ADAPTER].weight.device
        held[ADAPTER].weight = nn.Parameter(value.to(place, torch.float32), requires_grad=False)
