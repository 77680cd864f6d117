"""The whole model as transformers loads it by itself, quietly and without remote code."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import DistayaError, InputError
from .folder import read_json


def load_whole(folder: Path, dtype: torch.dtype, config: Any = None) -> nn.Module:
    """Causal language model of a folder the strict reader has checked, in eval mode, on the CPU.

    config stands for the folder's own. InputError when transformers refuses what our checks let
    pass.
    """
    extra = {} if config is None else {"config": config}
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), _with_metadata(folder) as readable:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                readable,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                **extra,
            )
        except DistayaError:  # our own loader runs inside; its sentence is the user's
            raise
        except (
            OSError,
            ValueError,
            RuntimeError,
            TypeError,
            LookupError,
            AttributeError,
        ) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{folder.name} passed our checks but transformers cannot load it: {reason}"
            ) from error
    return model.eval()


@contextlib.contextmanager
def _with_metadata(folder: Path) -> Iterator[Path]:
    """The folder, or links to its files beside an index that has the metadata it lacks.

    The format leaves an index's metadata optional and our reader does too; transformers does not.
    """
    name = "model.safetensors.index.json"
    index = {} if (folder / "model.safetensors").is_file() else read_json(folder, name)
    if not index or "metadata" in index:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="distaya-") as beside:
        for path in folder.iterdir():
            if path.is_file() and path.name != name:
                (Path(beside) / path.name).symlink_to(path.resolve())
        (Path(beside) / name).write_text(json.dumps({**index, "metadata": {}}), encoding="utf-8")
        yield Path(beside)


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
