"""What every model folder that we write ends with, whichever command made it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import manifest
from .errors import one_line


def complete(folder: Path, by: str | None = None, inputs: Mapping[str, Any] | None = None) -> None:
    """Add what is made from everything else in a folder; called last, before it is published, and
    again whenever a result is added to it. The files are replaced, never written through: they may
    be links to those of an earlier step.

    by, inputs: the command that made the folder and what of, for its manifest; see manifest.write.
    """
    _write_pages(folder)
    manifest.write(folder, by, inputs)


def _write_pages(folder: Path) -> None:
    """The pages are made from the result and never its end: where even a page that leaves out what
    is damaged cannot be made, that is said and the folder goes without. A full disk is an error.
    """
    from .report import write_pages

    try:
        write_pages(folder, damaged=[])
    except (OSError, MemoryError):
        raise
    except Exception as error:
        warnings.warn(f"no report was written: {one_line(error)}", RuntimeWarning, stacklevel=2)
