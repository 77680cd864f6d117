"""The work folder of a run, as those of its processes see it that do not hold it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..durable import put
from .work import place


class Guest:
    """Use as a context manager, as Work. root, scratch: see Work, of which rank 0 has one."""

    inputs, records = None, ()  # nobody but rank 0 looks

    def __init__(self, out: Path, folder: Path | None = None):
        self.root = folder or place(out)
        self.scratch = self.root / "scratch"

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def keep(self, name: str, write: Callable[[Path], Any]) -> dict[str, Any]:
        """As Work.keep; whoever holds the folder is to have the record."""
        return put(self.root / name, write)
