"""An append-only journal: one line of JSON per record, on the disk before append() returns."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SUM = "sum"


class Journal:
    """Records of a run, oldest first. Every line carries a checksum of itself.

    records are those that can be trusted: a last line without its end is what a kill while
    appending leaves, and is dropped; from a line that is damaged otherwise on nothing is trusted,
    and `damaged` says so in words.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records: list[dict[str, Any]] = []
        self.damaged: str | None = None
        self._good = 0  # bytes of the file that are trusted
        if path.exists():
            self._read()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record for good. OSError leaves the journal as it was."""
        line = (json.dumps({**record, _SUM: _sum(record)}) + "\n").encode()
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(handle, self._good)  # what was torn or not trusted goes
            os.lseek(handle, self._good, os.SEEK_SET)
            left = memoryview(line)
            try:
                while left:
                    left = left[os.write(handle, left) :]
                os.fsync(handle)
            except OSError as error:
                os.ftruncate(handle, self._good)
                raise OSError(error.errno, error.strerror, str(self.path)) from error
        finally:
            os.close(handle)
        self._good += len(line)
        self.records.append({k: v for k, v in json.loads(line).items() if k != _SUM})

    def _read(self) -> None:
        data = self.path.read_bytes()
        for line in data.splitlines(keepends=True):
            record = _record(line)
            if record is None:
                break
            self.records.append(record)
            self._good += len(line)
        rest = data[self._good :]
        if b"\n" in rest:
            self.damaged = f"line {len(self.records) + 1} of {self.path.name} is damaged"


def _sum(record: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=8).hexdigest()


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a whole line, None where it is torn or damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
        return record if record.pop(_SUM) == _sum(record) else None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
