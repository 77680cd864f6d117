"""What every model folder that we write ends with, whichever command made it."""

from __future__ import annotations

from pathlib import Path


def complete(folder: Path) -> None:
    """Add what is made from everything else in a folder; called last, before it is published, and
    again whenever a result is added to it. The files are replaced, never written through: they may
    be links to those of an earlier step.
    """
    from .report import write_pages

    write_pages(folder)
