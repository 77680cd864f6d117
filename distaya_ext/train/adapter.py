"""PEFT's LoRA folders, adapter_config.json and adapter_model.safetensors: read and attached.

Reading needs no peft. What a folder asks for and this cannot do is refused with the reason, so that
no adapter is ever applied in part.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoint import Checkpoint, check_finite
from ..checkpoint.entry import FLOATS, shape_text, some
from ..checkpoint.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, contained, read_json
from ..errors import InputError, UsageError
from ..formats.scheme import check_pattern
from .learned import LowRank

ABOVE = "base_model.model."  # what PEFT puts before every name
MASKED = "distaya_masked"  # in the metadata: these updates are of pruned weights, under their mask
# Keys that are read here, and keys that do not change what an adapter computes.
_READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias",
    "modules_to_save", "target_modules", "init_lora_weights", "fan_in_fan_out",
}  # fmt: skip
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "revision", "task_type",
    "peft_version", "lora_dropout", "megatron_core", "megatron_config", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "exclude_modules", "layers_to_transform",
    "layers_pattern", "runtime_config", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
_MOST_ALPHA = 1e30
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base's weights


@dataclass(frozen=True)
class Adapter:
    """LoRA by module and whole tensors by name, as the model calls them.

    masked: trained under the zeros of pruned weights, so that nothing is lost by keeping them
    """

    low_rank: dict[str, LowRank]
    tensors: dict[str, Tensor]
    masked: bool = False


def need_peft(what: str) -> None:
    """UsageError with what to install where peft is absent."""
    if importlib.util.find_spec("peft") is None:
        raise UsageError(f"{what} needs peft, which is not here: pip install 'distaya-ext[train]'")


def read_adapter(folder: str | Path, checkpoint: Checkpoint) -> Adapter:
    """The adapter of a PEFT folder for the model of a checkpoint.

    InputError in one sentence for anything but plain LoRA (DoRA, embeddings, biases, adapters that
    changed the base), for absent or misshapen tensors, rank 0, NaN, and modules the model has not.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"{folder} is no adapter folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
        )
    config = read_json(folder, ADAPTER_CONFIG)
    _check_config(config)
    shapes = linear_shapes(checkpoint)
    given, about = _load(folder)
    found, tensors = _sort(given, config, shapes, checkpoint)
    low_rank = {name: _low_rank(name, parts, config, shapes) for name, parts in found.items()}
    if lost := [name for name in shapes if _targets(config, name) and name not in low_rank]:
        raise InputError(f"the adapter targets {some(lost, 'module')} and holds no LoRA for them")
    if not low_rank and not tensors:
        raise InputError("the adapter holds no tensor")
    return Adapter(low_rank, tensors, MASKED in about)


def linear_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """[rows, cols] of the Linears of a checkpoint by name, the head included."""
    table, found = checkpoint.architecture, {}
    for name in (*checkpoint.linears(), table.head):
        where = table.embed if name == table.head and checkpoint.tied else name
        held, entry = checkpoint.stored.get(where), checkpoint.entries.get(f"{where}.weight")
        if held is not None:
            found[name] = (held.rows, held.cols)
        elif entry is not None:
            found[name] = (entry.shape[0], entry.shape[1])
    return found


def attach(model: Any, adapter: Adapter) -> Any:
    """Run the model with the adapter, in place; returns it. UsageError where peft is absent."""
    if adapter.low_rank:
        need_peft("the model's adapter")
        from . import lora

        lora.attach(model, adapter.low_rank)
    with torch.no_grad():
        for name, tensor in adapter.tensors.items():
            model.get_parameter(name).copy_(tensor)
    return model


def _check_config(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"the adapter is {str(kind)[:40]!r}; only LORA can be read")
    for key, value in config.items():
        if key not in _READ | _HARMLESS and value not in (None, False, [], {}, ""):
            raise InputError(
                f"the adapter uses {key[:60]}, which is more than W + alpha / rank B A; it cannot "
                "be merged here"
            )
    init = config.get("init_lora_weights", True)
    if not any(init is known or init == known for known in _INITS):
        raise InputError(
            f"the adapter began with {str(init)[:40]!r}, which changed the weights of its base; "
            "convert it to plain LoRA with PEFT first"
        )
    if config.get("bias", "none") != "none" or config.get("fan_in_fan_out"):
        raise InputError("the adapter trains biases or transposed weights, which cannot be merged")
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"the adapter has rank {str(rank)[:40]}; it must be 1 or more")
    _check_alpha(alpha)
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise InputError(f"{key} of the adapter must be a mapping")
        for pattern, value in patterns.items():
            check_pattern(f"re:{pattern}", f"{key} of the adapter")
            if key == "alpha_pattern":
                _check_alpha(value)


def _check_alpha(alpha: Any) -> None:
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not number or not 0 < alpha < _MOST_ALPHA:  # also false of NaN
        raise InputError(
            f"the adapter has lora_alpha {str(alpha)[:40]}; it must be above 0 and below "
            f"{_MOST_ALPHA:g}"
        )


def _load(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors, and the metadata of their file."""
    path = contained(folder, ADAPTER_WEIGHTS)
    if not path.is_file():
        raise InputError(f"the adapter folder {folder.name} has no {ADAPTER_WEIGHTS}")
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{ADAPTER_WEIGHTS} is damaged: {error}") from error
    for name, tensor in found.items():
        if tensor.dtype not in FLOATS:
            raise InputError(f"tensor {name[:120]} of the adapter is {tensor.dtype}, no float")
        check_finite(name, tensor)
    return found, about


def _sort(
    given: Mapping[str, Tensor],
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, int]],
    checkpoint: Checkpoint,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """A and B by module, and whole tensors by name."""
    found: dict[str, dict[str, Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    for full, tensor in given.items():
        name = full.removeprefix(ABOVE)
        module, _, part = name.removesuffix(".weight").rpartition(".")
        if part in ("lora_A", "lora_B") and name.endswith(".weight"):
            if module not in shapes:
                raise InputError(
                    f"the adapter updates {module[:120]}, which is no Linear of this model"
                )
            found.setdefault(module, {})[part] = tensor
        elif "lora_" in name:
            raise InputError(
                f"the adapter holds {name[:120]}; only A and B of Linears can be merged"
            )
        else:
            tensors[name] = _whole(name, tensor, config, checkpoint)
    table = checkpoint.architecture
    if table.head in found and checkpoint.tied and table.embed not in checkpoint.stored:
        raise InputError(
            f"the adapter updates {table.head}, which is tied to the embedding of this model; "
            "merging it would change the embedding too"
        )
    return found, tensors


def _whole(name: str, tensor: Tensor, config: Mapping[str, Any], checkpoint: Checkpoint) -> Tensor:
    """A tensor that replaces one of the model, which modules_to_save must announce."""
    modules = config.get("modules_to_save") or []
    entry = checkpoint.entries.get(name)
    module = name.rpartition(".")[0]
    said = isinstance(modules, list) and any(
        isinstance(each, str) and module.endswith(each) for each in modules
    )
    if not said or entry is None or entry.dtype not in FLOATS or module in checkpoint.stored:
        raise InputError(f"the adapter holds {name[:120]}, which has no place in this model")
    if entry.shape != tuple(tensor.shape):
        raise InputError(
            f"{name} of the adapter has shape {shape_text(tuple(tensor.shape))} and the model's "
            f"is {shape_text(entry.shape)}"
        )
    return tensor


def _low_rank(
    name: str,
    parts: Mapping[str, Tensor],
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, int]],
) -> LowRank:
    for part in ("lora_A", "lora_B"):
        if part not in parts:
            raise InputError(f"the adapter lacks {name}.{part}.weight")
    A, B = parts["lora_A"], parts["lora_B"]
    rows, cols = shapes[name]
    rank = _of(config, "rank_pattern", name, config.get("r", 8))
    if not isinstance(rank, int) or rank < 1 or A.shape != (rank, cols) or B.shape != (rows, rank):
        raise InputError(
            f"LoRA of {name} is A {shape_text(tuple(A.shape))} and B {shape_text(tuple(B.shape))}; "
            f"rank {rank} of a {rows}x{cols} matrix needs {rank}x{cols} and {rows}x{rank}"
        )
    alpha = float(_of(config, "alpha_pattern", name, config.get("lora_alpha", 8)))
    return LowRank(A, B, alpha * math.sqrt(rank) if config.get("use_rslora") else alpha)


def _of(config: Mapping[str, Any], key: str, name: str, default: Any) -> Any:
    """What rank_pattern or alpha_pattern says of a module, as PEFT reads it."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _targets(config: Mapping[str, Any], name: str) -> bool:
    """Whether target_modules, where it is a plain list, means this Linear."""
    targets = config.get("target_modules")
    narrowed = any(
        config.get(key) is not None for key in ("layers_to_transform", "exclude_modules")
    )
    if not isinstance(targets, list) or narrowed:
        return False
    return any(isinstance(t, str) and (name == t or name.endswith(f".{t}")) for t in targets)
