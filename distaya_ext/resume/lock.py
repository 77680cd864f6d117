"""One run at a time in a folder: a lock that the system lets go of when its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from ..errors import UsageError


class Lock:
    """A locked file in a folder, made when it is not there; it tells the holder's process id.

    take() raises UsageError, one sentence with that number, when another run holds it.
    """

    def __init__(self, folder: Path, name: str = "lock"):
        self.folder, self.path = folder, folder / name
        self._handle = -1

    def take(self) -> None:
        while True:
            self._handle = os.open(
                self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666
            )
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = os.pread(self._handle, 32, 0).decode("ascii", "replace").strip()
                self.release()
                who = f" (process {holder})" if holder.isdecimal() else ""
                raise UsageError(
                    f"another run{who} is at work in {self.folder}; wait for it, or choose another "
                    "output"
                ) from None
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(self._handle).st_ino == os.stat(self.path).st_ino:
                    break
            self.release()  # whoever held it removed the folder
            self.folder.mkdir(exist_ok=True)
        os.ftruncate(self._handle, 0)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the number
            os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
