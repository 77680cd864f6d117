"""PEFT's LoRA folders (adapter_config.json, adapter_model.safetensors): reading, writing, attaching.

Reading and writing need no peft. What a folder asks for and this cannot do is refused with the
reason, so that no adapter is ever applied in part.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..checkpoint import Checkpoint
from ..checkpoint.entry import some
from ..checkpoint.folder import read_json
from ..errors import InputError, UsageError
from .learned import LowRank

FOLDER = "adapter"  # beside the model it belongs to
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ABOVE = "base_model.model."  # what PEFT puts before every name
# Keys that say nothing about what the adapter computes, or are read below.
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
_WHOLE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # inits that leave W as it is


@dataclass(frozen=True)
class Adapter:
    """LoRA by module and whole tensors by name, as the model calls them."""

    low_rank: dict[str, LowRank]
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.low_rank.values()) + sum(
            tensor.nbytes for tensor in self.tensors.values()
        )


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
        raise InputError(f"{folder} is no adapter folder with {CONFIG} and {WEIGHTS}")
    config = read_json(folder, CONFIG)
    _check_config(config)
    shapes = linear_shapes(checkpoint)
    found, tensors = _sort(_load(folder), config, shapes, checkpoint)
    low_rank = {name: _low_rank(name, parts, config, shapes) for name, parts in found.items()}
    lost = [name for name in shapes if _targets(config, name) and name not in low_rank]
    if lost:
        raise InputError(f"the adapter targets {some(lost, 'module')} and holds no LoRA for them")
    if not low_rank and not tensors:
        raise InputError("the adapter holds nothing")
    return Adapter(low_rank, tensors)


def linear_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """[rows, cols] of the Linears of a checkpoint by name, the head included."""
    found = {}
    for name in (*checkpoint.linears(), checkpoint.architecture.head):
        held, entry = checkpoint.stored.get(name), checkpoint.entries.get(f"{name}.weight")
        if held is not None:
            found[name] = (held.rows, held.cols)
        elif entry is not None:
            found[name] = (entry.shape[0], entry.shape[1])
    return found
