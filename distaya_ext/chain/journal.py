"""The work folder of a chain: a hidden sibling of the output that survives being killed.

.OUT.chain/steps.json    what has been done from what, see Done
           lock          held while a run is at work
           <step>/       the result of a finished step, renamed into place when all of it is on
                         the disk
           <step>.work/  what a step that can go on by itself has so far
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..durable import sync, sync_all, write_whole
from ..errors import InputError
from ..resume.held import Held

JOURNAL = "steps.json"
_LOCK = "lock"


@dataclass
class Done:
    """A step that was begun (seconds None) or finished, what it depends on and the hash of that."""

    inputs: dict[str, Any]
    fingerprint: str
    seconds: float | None = None


class WorkFolder:
    """The folder, locked. Use as a context manager; UsageError when another run holds it.

    restart: what is in it is thrown away.
    """

    def __init__(self, out: Path, *, restart: bool = False):
        self.path, self.restart = place(out), restart
        self.steps: dict[str, Done] = {}
        self._held = Held(self.path, _LOCK)

    def __enter__(self) -> WorkFolder:
        self._held.enter()
        try:
            self.steps = {} if self.restart else self._read()
            self.tidy()
        except BaseException:
            self._held.leave()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of it. Nothing that could be gone on with: the folder disappears, too."""
        if self.path.exists() and not self.worth_keeping:
            self.remove()
        self._held.leave()

    @property
    def worth_keeping(self) -> bool:
        """Whether a step is finished, or one can go on from where it stopped."""
        return any(step.seconds is not None for step in self.steps.values()) or any(
            self.work(name).exists() for name in self.steps
        )

    def folder(self, step: str) -> Path:
        """Where the result of a finished step lies."""
        return self.path / step

    def part(self, step: str) -> Path:
        """Where a step writes its result."""
        return self.path / f"{step}.part"

    def work(self, step: str) -> Path:
        """Where a step that can go on keeps what it has."""
        return self.path / f"{step}.work"

    def finished(self, step: str) -> bool:
        done = self.steps.get(step)
        return done is not None and done.seconds is not None and self.folder(step).is_dir()

    def begin(self, step: str, done: Done) -> bool:
        """Note that a step is at work, and whether its result is there already: it was killed
        between writing it, which is done in one rename, and finish().
        """
        written = step in self.steps and self.part(step).is_dir()
        _remove(self.folder(step))
        self.steps[step] = done
        self._write()
        return written

    def finish(self, step: str, seconds: float) -> None:
        """Put what a step has written in place, for good."""
        sync_all(self.part(step))
        os.replace(self.part(step), self.folder(step))
        sync(self.path)
        self.steps[step].seconds = seconds
        self._write()
        _remove(self.work(step))

    def forget(self, steps: list[str]) -> None:
        """Steps that have to be done anew."""
        for step in steps:
            self.steps.pop(step, None)
        self._write()
        for step in steps:
            for path in (self.folder(step), self.part(step), self.work(step)):
                _remove(path)

    def tidy(self) -> None:
        """Remove what a run that was killed left beside the steps."""
        known = {_LOCK, JOURNAL}
        for step, done in self.steps.items():
            known |= {self.work(step).name, step if done.seconds is not None else f"{step}.part"}
        for path in self.path.iterdir():
            if path.name not in known:
                _remove(path)

    def remove(self) -> None:
        """All of it."""
        self.steps = {}
        shutil.rmtree(self.path, ignore_errors=True)

    def _read(self) -> dict[str, Done]:
        path = self.path / JOURNAL
        if not path.exists():
            return {}
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            steps = {name: Done(**step) for name, step in held["steps"].items()}
            good = all(isinstance(s.inputs, dict) and _plain(name) for name, s in steps.items())
        except (ValueError, TypeError, KeyError, AttributeError):
            good = False
        if not good:
            raise InputError(f"{path} is damaged; --restart begins the chain anew")
        for name, step in steps.items():
            if step.seconds is not None and not self.folder(name).is_dir():
                raise InputError(f"{self.folder(name)} is gone; --restart begins the chain anew")
        return steps

    def _write(self) -> None:
        text = json.dumps({"steps": {k: asdict(v) for k, v in self.steps.items()}}, indent=1)
        write_whole(
            self.path / JOURNAL, lambda path: path.write_text(text + "\n", encoding="utf-8")
        )


def place(out: Path) -> Path:
    """The work folder of an output."""
    out = Path(os.path.abspath(out))
    return out.parent / f".{out.name}.chain"


def _plain(name: str) -> bool:
    return name.isascii() and name.isalpha()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
