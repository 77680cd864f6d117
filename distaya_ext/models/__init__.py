"""The architecture table: one file per family, one entry per `model_type` of transformers."""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from . import cohere, cohere2, gemma, llama, mistral, qwen
from .architecture import Architecture, Stage

__all__ = ["SUPPORTED", "Architecture", "Stage", "describe"]

_FAMILIES = (cohere, cohere2, llama, mistral, gemma, qwen)
_TABLE = {entry.model_type: entry for family in _FAMILIES for entry in family.ARCHITECTURES}

SUPPORTED = tuple(_TABLE)


def describe(config: Any) -> Architecture:
    """Table entry of a transformers config (or of the dict read from config.json).

    Raises InputError naming the supported list when `model_type` is absent or not in the table.
    """
    get = config.get if isinstance(config, dict) else lambda key: getattr(config, key, None)
    model_type = get("model_type")
    if not isinstance(model_type, str) or model_type not in _TABLE:
        hint = " (use the text model gemma3_text)" if model_type == "gemma3" else ""
        raise InputError(
            f"model_type {model_type!r} is not supported{hint}; "
            f"supported are {', '.join(SUPPORTED)}"
        )
    return _TABLE[model_type]
