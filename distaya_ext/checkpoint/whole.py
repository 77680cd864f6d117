"""The whole model as transformers loads it by itself, quietly and without remote code."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import DistayaError, InputError
from ..ranks import read_shared, team
from .folder import read_json

if TYPE_CHECKING:
    from .reader import Checkpoint

_GENERATION = "generation_config.json"
_AT_ONCE = 32  # tensors read before they are given their dtype


def load_whole(folder: Path, dtype: torch.dtype, config: Any = None) -> nn.Module:
    """Causal language model of a folder the strict reader has checked, in eval mode, on the CPU.

    config stands for the folder's own. InputError when transformers refuses what our checks let
    pass.
    """
    extra = {} if config is None else {"config": config}
    with quiet_transformers(), _with_metadata(folder) as readable:
        return _loaded(folder, readable, dtype, **extra)


def load_together(checkpoint: Checkpoint, dtype: torch.dtype, config: Any = None) -> nn.Module:
    """load_whole by all ranks, each of which then has the model and has read its share of the
    weights; to be called by all of them. Packed modules are left to our own loader.
    """
    if team().alone:
        return load_whole(checkpoint.folder, dtype, config)
    packed = {
        f"{module}.{suffix}"
        for module, held in checkpoint.stored.items()
        for suffix in held.scheme.tensors(held.rows, held.cols, checkpoint.dtype)
    }
    names = [name for name in checkpoint.entries if name not in packed]
    state: dict[str, torch.Tensor] = {}
    for start in range(0, len(names), _AT_ONCE):
        for name, tensor in read_shared(checkpoint, names[start : start + _AT_ONCE]).items():
            wider = tensor.is_floating_point() and dtype.itemsize > tensor.itemsize
            state[name] = tensor.to(dtype) if wider else tensor  # never both for long
    with quiet_transformers():
        told = checkpoint.config if config is None else config
        model = _loaded(checkpoint.folder, None, dtype, config=told, state_dict=state)
        model.config.name_or_path = model.name_or_path = str(checkpoint.folder)
        model.generation_config = _generation(checkpoint.folder)
    return model


def _loaded(folder: Path, readable: Path | None, dtype: torch.dtype, **more: Any) -> nn.Module:
    """What transformers makes of a folder (None: of the config and the weights in `more`)."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    of_class = AutoModelForCausalLM  # which needs a folder
    if readable is None:
        of_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(more["config"])]
    try:
        model = of_class.from_pretrained(
            readable,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **more,
        )
    except DistayaError:  # our own loader runs inside; its sentence is the user's
        raise
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{folder.name} passed our checks but transformers cannot load it: {reason}"
        ) from error
    return model.eval()


def _generation(folder: Path) -> Any:
    """The folder's generation settings, or those in an old config.json, as from_pretrained does."""
    from transformers import GenerationConfig

    if (folder / _GENERATION).is_file():
        return GenerationConfig.from_dict(read_json(folder, _GENERATION))
    return GenerationConfig.from_model_config(read_json(folder, "config.json"))


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
