"""What learns, and how it is moved: AdamW, the learning rate's course, the precision of passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from .spec import TrainSpec


def learning(whole: nn.Module) -> dict[str, nn.Parameter]:
    """What requires a gradient, by name. UsageError for nothing, or for another type than float32.

    Names are those of the model; what the loss trains beside has "loss." before.
    """
    found: dict[str, nn.Parameter] = {}
    for name, parameter in whole.named_parameters():
        if parameter.requires_grad:
            short = name.removeprefix("model.")
            if name.startswith("modules_of_loss."):
                short = "loss." + name.removeprefix("modules_of_loss.")
            found[short] = parameter
    if not found:
        raise UsageError("nothing of the model requires a gradient, so there is nothing to train")
    for name, parameter in found.items():
        if parameter.dtype != torch.float32:
            raise UsageError(
                f"{name} is to be trained and is {str(parameter.dtype).removeprefix('torch.')}; "
                "what learns must be float32"
            )
    return found


def adamw(parameters: Mapping[str, nn.Parameter], spec: TrainSpec) -> torch.optim.AdamW:
    """AdamW whose weight decay is for matrices alone (norms, biases and scales are none)."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    others = [p for p in parameters.values() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": spec.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=spec.learning_rate)


def schedule(optimizer: torch.optim.Optimizer, spec: TrainSpec) -> Any:
    """The learning rate's course over the run: warmup, then as spec.schedule says."""
    from transformers import get_scheduler

    name = {"constant": "constant_with_warmup"}.get(spec.schedule, spec.schedule)
    warm = min(int(spec.warmup * spec.steps), spec.steps - 1)
    return get_scheduler(name, optimizer, num_warmup_steps=warm, num_training_steps=spec.steps)


def precision(wanted: str, device: torch.device) -> str:
    """float32 or bfloat16: what was asked for, or bfloat16 where the device multiplies it."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        able = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        able = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bfloat16" if able else "float32"
