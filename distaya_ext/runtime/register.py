"""quant_method "distaya" in transformers, whichever of the two packages is imported first.

Importing transformers takes seconds and most commands never need it, so nothing here imports it:
when its table of quantisers is filled already we add to it, otherwise a finder waits for that one
module, adds to the table when it has been run, and goes.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

_TABLE = "transformers.quantizers.auto"
METHOD = "distaya"


class HandedOver(dict):
    """The configuration of another method, which load() gives to our hooks; no JSON makes one.

    together: the checkpoint, where all ranks read it together.
    """

    together: Checkpoint | None = None


def register_when_imported() -> None:
    """Make transformers know our method now or, if it is not imported yet, as soon as it is."""
    table = sys.modules.get(_TABLE)
    if table is not None and hasattr(table, "register_quantizer"):
        register(table)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register(table: ModuleType | None = None) -> None:
    """Add our configuration and quantiser to the tables of transformers, once."""
    if table is None:
        import transformers.quantizers.auto as table
    if METHOD in table.AUTO_QUANTIZER_MAPPING:
        return
    from .quantizer import FolderConfig, PackedQuantizer

    table.register_quantization_config(METHOD)(FolderConfig)
    table.register_quantizer(METHOD)(PackedQuantizer)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what the others find, but lets the one module be followed by our registration."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _TABLE:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """The module's own loader; once it has run the module, it takes its place back."""

    def __init__(self, own: Any, finder: _Finder) -> None:
        self._own, self._finder = own, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._own
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        self._own.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        register(module)
