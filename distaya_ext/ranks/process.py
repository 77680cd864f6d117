"""Which process a rank is, and whether it is still there."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """host: as people call it. place: the machine since it was started, and the container, within
    which a process id means something. start: clock ticks from the machine's start to that of the
    process; a later process of the same id has another ("": not known).
    """

    host: str
    place: str
    pid: int
    start: str

    @staticmethod
    def own() -> Process:
        return Process._of(os.getpid())

    @staticmethod
    def parent() -> Process:
        return Process._of(os.getppid())

    @staticmethod
    def _of(pid: int) -> Process:
        return Process(socket.gethostname(), _place(), pid, (_state(pid) or ("", ""))[1])

    def gone(self, place: str) -> bool:
        """Whether it has ended, as a process of this place sees it; of another place False."""
        if not self.start or self.place != place:
            return False
        try:
            found = _state(self.pid)
        except OSError:  # hidden from us, which says nothing
            return False
        # A zombie has ended, and its parent has not asked for its exit code yet.
        return found is None or found[0] in "ZX" or found[1] != self.start


def _place() -> str:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return f"unknown {socket.gethostname()}"


def _state(pid: int) -> tuple[str, str] | None:
    """(state, start) of a process; None when there is none."""
    try:
        told = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = told.rpartition(")")[2].split()  # the name before it may hold anything
    return fields[0], fields[19]
