"""What every model folder that we write ends with, whichever command made it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import manifest


def complete(folder: Path, by: str | None = None, inputs: Mapping[str, Any] | None = None) -> None:
    """Add what is made from everything else in a folder; called last, before it is published, and
    again whenever a result is added to it. The files are replaced, never written through: they may
    be links to those of an earlier step.

    by, inputs: the command that made the folder and what of, for its manifest; see manifest.write.
    """
    manifest.write(folder, by, inputs)
