"""Files that are on the disk before anything relies on them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Have the disk hold a file's contents, or a folder's names, before this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """The same of everything in a folder, and of the folder."""
    for root, _, names in os.walk(folder):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Have write(file) make a file beside `path`, sync it and give it its name: whoever finds
    `path` finds all of it.
    """
    beside = path.with_name(path.name + ".partial")
    write(beside)
    sync(beside)
    os.replace(beside, path)
    sync(path.parent)
