"""Reading packed modules out of safetensors files, one module at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..checkpoint import check_finite
from ..errors import InputError
from .modules import Packed, PackedLinear
from .place import stray_bias

_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F64": torch.float64,
}

# name -> (file, dtype or None for one we do not know, shape)
Held = dict[str, tuple[Path, "torch.dtype | None", tuple[int, ...]]]


def read_headers(paths: Iterable[str | Path]) -> Held:
    """What the files hold, from their headers. InputError for a damaged file."""
    held: Held = {}
    for path in map(Path, paths):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    shape = tuple(part.get_shape())
                    held[name] = (path, _DTYPES.get(part.get_dtype()), shape)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path.name} is damaged: {error}; download it again") from error
    return held


def fill(modules: Mapping[str, Packed], held: Held, device: Any = "cpu") -> None:
    """Read, decode and pack the modules by name, one after another.

    At no time is more than one module unpacked in memory, and none is ever dense.
    """
    for name, module in modules.items():
        wanted = {suffix: f"{name}.{suffix}" for suffix in module.tensors()}
        if stray_bias(module) and f"{name}.bias" in held:
            wanted["bias"] = f"{name}.bias"
        tensors = read({suffix: (full, held[full][0]) for suffix, full in wanted.items()})
        bias = tensors.pop("bias", None)
        module.take(tensors, name, device)
        if bias is not None:
            _keep_bias(module, bias, name)


def read(wanted: Mapping[str, tuple[str, Path]]) -> dict[str, Tensor]:
    """Tensors by key; wanted gives the name and file of each. InputError for NaN or infinity."""
    by_file = defaultdict(list)
    for key, (name, path) in wanted.items():
        by_file[path].append((key, name))
    found = {}
    for path, names in by_file.items():
        # Opened anew each time: a mapping that stays open keeps every page it touched resident.
        with safe_open(path, framework="pt") as file:
            for key, name in names:
                found[key] = tensor = file.get_tensor(name)
                if tensor.is_floating_point():
                    check_finite(name, tensor)
    return found


def _keep_bias(module: Packed, bias: Tensor, name: str) -> None:
    assert isinstance(module, PackedLinear)
    if bias.shape != (module.rows,) or not bias.is_floating_point():
        raise InputError(
            f"{name}.bias has shape {list(bias.shape)}; {module.rows} numbers are needed"
        )
    if bool(bias.any()):
        assert module.packed is not None
        kept = bias.to(module.packed.device, module.stored, copy=True)
        module.bias = nn.Parameter(kept, requires_grad=False)
