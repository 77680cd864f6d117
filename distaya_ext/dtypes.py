"""The float types of weights, activations and scales, by name."""

import torch

from .errors import UsageError

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The type of that name (or the type itself); None for "auto". UsageError for another."""
    if isinstance(dtype, str):
        if dtype == "auto":
            return None
        dtype = FLOATS.get(dtype, dtype)
    if dtype not in FLOATS.values():
        raise UsageError(f"dtype {dtype!r} is none of auto, {', '.join(FLOATS)}")
    return dtype
