"""Files that survive a fall of the machine: written, on the disk, and named, before anything relies
on them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BLOCK = 1 << 22
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


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
    put(path, write)
    sync(path.parent)


def put(path: Path, write: Callable[[Path], Any]) -> dict[str, Any]:
    """write_whole, but the folder's names are the caller's to sync; returns what describe() does.

    OSError of a full disk names the file, whichever library met it; nothing half-written stays.
    """
    beside = path.with_name(path.name + ".partial")
    beside.unlink(missing_ok=True)  # not through a link that somebody put there
    try:
        write(beside)
        sync(beside)
        found = describe(beside)
        os.replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        if (meant := as_os_error(error, path)) is not error:
            raise meant from error
        raise
    return found


def describe(path: Path) -> dict[str, Any]:
    """{"size": bytes, "blake2b": 64 digits} of a file."""
    made, size = hashlib.blake2b(digest_size=32), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            made.update(block)
            size += len(block)
    return {"size": size, "blake2b": made.hexdigest()}


def as_os_error(error: BaseException, path: Path) -> BaseException:
    """The OSError that an error stands for: libraries that are no Python tell its number in words,
    and a write through a handle does not tell the file.
    """
    if isinstance(error, OSError):
        if error.errno is None or error.filename is not None:
            return error
        return OSError(error.errno, os.strerror(error.errno), str(path))
    told = _OS_ERROR.search(str(error)) if isinstance(error, Exception) else None
    if told is None:
        return error
    return OSError(int(told[1]), os.strerror(int(told[1])), str(path))
