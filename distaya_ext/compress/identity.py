"""What decides the weights that a run writes: what must be equal for a run to go on."""

from __future__ import annotations

from typing import Any

import torch

from .. import __version__
from ..checkpoint import Checkpoint
from ..recipe import Recipe
from ..resume import kernels, model_identity, texts_identity
from .calibrate import Calibration

# Fields of a recipe that decide nothing: where the model lies, the other steps of a chain, memory.
_NOT_DECIDING = {"model", "heal", "evaluate", "max_ram", "max_vram"}


def identity(
    checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration | None, device: torch.device
) -> dict[str, Any]:
    """As plain values for resume.difference(): version, kernels, files of the model, recipe with
    the seed, and the hash of the tokens that are really used (None: there are none).
    """
    fields = recipe.model_dump(mode="json", exclude=_NOT_DECIDING)
    fields["calibration"].pop("path")  # where the texts lie decides nothing
    return {
        "version": __version__,
        "kernels": kernels(device),
        "model": model_identity(checkpoint.folder),
        "recipe": fields,
        "texts": texts_identity(calibration),
    }
