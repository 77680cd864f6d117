"""Versions of everything that decides what a run writes."""

from __future__ import annotations

import platform
from importlib import import_module


def versions(*more: str) -> dict[str, str]:
    """Name -> version of this package, torch, transformers, safetensors and Python, and of the
    packages in `more`.
    """
    from . import __version__

    found = {"distaya_ext": __version__}
    for name in ("torch", "transformers", "safetensors", *more):
        found[name] = import_module(name).__version__
    return found | {"python": platform.python_version()}
