"""Reading packed modules out of safetensors files, one module at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ..checkpoint import Entry, aligned, check_finite
from .modules import Packed


def fill(
    modules: Mapping[str, Packed],
    read: Callable[[Iterable[str]], Mapping[str, Tensor]],
    device: Any = "cpu",
) -> None:
    """Read, decode and pack the modules by name, one after another. read: tensors by name.

    At no time is more than one module unpacked in memory, and none is ever dense.
    """
    for name, module in modules.items():
        tensors = read([f"{name}.{suffix}" for suffix in module.tensors()])
        module.take({full[len(name) + 1 :]: t for full, t in tensors.items()}, name, device)


def read(entries: Mapping[str, Entry], names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors by name. InputError for NaN or infinity."""
    by_file = defaultdict(list)
    for name in names:
        by_file[entries[name].path].append(name)
    found = {}
    for path, held in by_file.items():
        # Opened anew each time: a mapping that stays open keeps every page it touched resident.
        with safe_open(path, framework="pt") as file:
            for name in held:
                found[name] = tensor = aligned(file.get_tensor(name))
                if tensor.is_floating_point():
                    check_finite(name, tensor)
    return found
