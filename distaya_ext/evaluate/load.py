"""Loading a model to run it: our strict reader checks the folder, then transformers loads it.

Packed weights stay packed (distaya_ext.runtime).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint, check_finite, open_checkpoint
from ..device import find_device
from ..dtypes import parse_dtype
from ..errors import InputError
from ..runtime.load import load_opened
from ..runtime.paths import tell
from ..tokenizer import load_tokenizer

# Below this many bytes of weights a copy in float32 is cheap and takes rounding out of the
# comparison.
_FLOAT32_BELOW = 2 << 30


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode with its tokenizer, under the name it is reported by."""

    name: str
    model: torch.nn.Module
    tokenizer: Any

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.model.config.vocab_size


def load(
    model: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    offline: bool = False,
    exact: bool = False,
    together: bool = False,
) -> Loaded:
    """Load a local folder or hub id after checking it. InputError in one sentence for what is
    wrong.

    dtype "auto" is float32 for checkpoints under 2 GiB (when dense) and the checkpoint's own
    otherwise. exact runs packed weights with full-precision activations on the CPU too. Remote code
    is never run, and only safetensors are read. together: all ranks call this, and each has the
    whole model, of which it has read its share.
    """
    chosen = parse_dtype(dtype)
    place = find_device(device)
    checkpoint = open_checkpoint(model, offline=offline, packed=True)
    if checkpoint.scheme is not None:
        find_device(device, kernels=True)
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config.vocab_size)
    if chosen is None:
        chosen = torch.float32 if _dense_bytes(checkpoint) < _FLOAT32_BELOW else checkpoint.dtype
    network = load_opened(checkpoint, chosen, exact=exact, together=together)
    for name, weight in network.named_parameters():
        check_finite(name, weight.data)
    network = network.to(place)
    tell(network)
    return Loaded(str(model), network, tokenizer)


def _dense_bytes(checkpoint: Checkpoint) -> int:
    """What all tensors take, or would if none were packed."""
    packed = checkpoint.stored
    sizes = [e.nbytes for n, e in checkpoint.entries.items() if n.rpartition(".")[0] not in packed]
    return sum(sizes) + checkpoint.dtype.itemsize * sum(m.rows * m.cols for m in packed.values())


def check_same_vocabulary(model: Loaded, base: Loaded) -> None:
    """InputError unless both give the same ids to the same text: token by token needs that."""
    if model.vocabulary != base.vocabulary:
        raise InputError(
            f"{model.name} has a vocabulary of {model.vocabulary} and {base.name} one of "
            f"{base.vocabulary}; "
            "they cannot be compared token by token"
        )
    if model.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise InputError(
            f"the tokenizers of {model.name} and {base.name} differ; token by token needs the same"
        )
