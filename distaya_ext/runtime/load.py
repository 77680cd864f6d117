"""load(): a model folder or hub id, packed or dense, as a model of transformers in eval mode."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.whole import load_together, load_whole
from ..device import find_device
from ..dtypes import parse_dtype
from ..ranks import team
from .paths import tell
from .register import METHOD, HandedOver, register
from .swap import set_exact


def load(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: str | torch.dtype = "auto",
    exact: bool = False,
    offline: bool = False,
) -> Any:
    """A causal language model of transformers whose packed weights stay packed.

    path     our folders, compressed-tensors pack-quantized and GPTQ ones (straight from the shards
             into the layout of the kernels, never dense), and dense models as transformers has them
    device   cpu, cuda or cuda:N
    dtype    of activations, norms and whatever is dense: auto is that of the checkpoint
    exact    full-precision activations on the CPU too, where 8-bit ones are the default

    LoRA that the folder holds in adapter/, as healing leaves it beside quantised weights, is
    attached with PEFT.

    SlowKernelWarning where modules run slower than they could, see paths.slow_paths.

    InputError and UsageError in one sentence. Remote code is never run, pickles are never read.
    """
    chosen = parse_dtype(dtype)
    checkpoint = open_checkpoint(path, offline=offline, packed=True)
    place = find_device(device, kernels=checkpoint.scheme is not None)
    model = load_opened(checkpoint, chosen or checkpoint.dtype, exact=exact).to(place)
    tell(model)
    return model


def load_opened(
    checkpoint: Checkpoint, dtype: torch.dtype, *, exact: bool = False, together: bool = False
) -> Any:
    """The model of a folder that is checked, on the CPU in eval mode.

    together: all ranks call this and read every weight once between them, an adapter's each by
    itself. Without it a rank reads all by itself, whatever others do.
    """
    if checkpoint.adapter is None:
        return _load_base(checkpoint, dtype, exact, together)
    from ..train.adapter import attach, need_peft, read_adapter

    need_peft(f"the adapter in {checkpoint.folder.name}")
    adapter = read_adapter(checkpoint.adapter, checkpoint)
    return attach(_load_base(checkpoint, dtype, exact, together), adapter)


def _load_base(checkpoint: Checkpoint, dtype: torch.dtype, exact: bool, together: bool) -> Any:
    if checkpoint.scheme is None:
        return (
            load_together(checkpoint, dtype) if together else load_whole(checkpoint.folder, dtype)
        )
    register()
    # Stock methods go through our hooks too, under our name; the model's config keeps theirs.
    config = copy.deepcopy(checkpoint.config)
    about = HandedOver(config.quantization_config)
    config.quantization_config = {"quant_method": METHOD, "holds": about}
    if together and not team().alone:
        about.together = checkpoint
        model = load_together(checkpoint, dtype, config)
    else:
        model = load_whole(checkpoint.folder, dtype, config)
    set_exact(model, exact)
    return model
