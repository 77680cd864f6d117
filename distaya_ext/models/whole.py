"""The whole model as transformers loads it by itself, quietly and without remote code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from ..errors import InputError


def load_whole(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Causal language model of a folder the strict reader has checked, in eval mode, on the CPU.

    InputError when transformers refuses what our checks let pass.
    """
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{folder.name} passed our checks but transformers cannot load it: {reason}"
            ) from error
    return model.eval()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside the block transformers shows no bars and gives no advice; both come back after."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
