"""A hidden folder beside an output, locked while a run is in it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ..errors import InputError
from .lock import Lock


class Held:
    """The folder of a run that can be gone on with.

    enter() makes it, with the folders above it that are not there, and locks it: UsageError when
    another run holds it, InputError when something else is in the way. leave() unlocks it and takes
    away the folders that it made and that nothing came into.
    """

    def __init__(self, root: Path, lock: str = "lock"):
        self.root = root
        self._lock = Lock(root, lock)
        self._made: list[Path] = []

    def enter(self) -> None:
        refuse_foreign(self.root)
        for folder in reversed([p for p in (self.root, *self.root.parents) if not p.exists()]):
            folder.mkdir(exist_ok=True)
            self._made.append(folder)
        self._lock.take()
        try:
            refuse_foreign(self.root)  # what it was may have changed while nobody held it
        except BaseException:
            self._lock.release()
            raise

    def leave(self) -> None:
        self._lock.release()
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # holds the result, or what was kept
                folder.rmdir()


def refuse_foreign(root: Path) -> None:
    """InputError for a link or a file, and for a folder with something in it that another user made
    where everyone may write: what it says could name any file of ours.
    """
    if root.is_symlink() or (root.exists() and not root.is_dir()):
        raise InputError(f"{root} is in the way: it is no folder of a run of ours")
    if root.exists() and any(root.iterdir()) and _made_by_another(root):
        raise InputError(
            f"{root} is in the way: another user made it where everyone may write, and what it "
            "says is not believed"
        )


def _made_by_another(root: Path) -> bool:
    """Whether somebody else could have made a folder, and did."""
    everyone = root.parent.stat().st_mode & 0o022
    return bool(everyone) and root.lstat().st_uid != os.geteuid()
