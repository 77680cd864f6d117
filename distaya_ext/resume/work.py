"""The work folder of a run: a hidden sibling of the output that survives being killed.

.OUT.compress/lock           held while a run is at work, see lock.Lock
              journal.jsonl  what is done, from what; see journal.Journal
              model/         the output while it is put together
              scratch/       what a run spills; nothing goes on from it
              replaced/      an older output, while the new one takes its place
              ...            files that records of the journal name, with size and BLAKE2b

A file is written under another name, synced and renamed, then the folder is synced, and only then
the record that names it is appended and synced. So what the journal says is there is there,
whenever the run was killed or the machine fell.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import check_output, put_in_place
from ..durable import describe, put, sync, sync_all
from ..errors import InputError, UsageError, add_note
from .held import Held
from .identity import difference
from .journal import Journal

JOURNAL, LOCK = "journal.jsonl", "lock"
_BEGIN, _PUBLISH = "begin", "publish"
_WORTH = ("layer", _PUBLISH)  # records that a run can go on from
_PROOF = "results.json"  # the file of an output by which a run knows it as its own


def place(out: Path) -> Path:
    """The work folder of an output."""
    out = Path(os.path.abspath(out))
    return out.parent / f".{out.name}.compress"


class Work:
    """The folder, locked. Use as a context manager; UsageError when another run holds it,
    InputError when something that is no folder of ours is in the way.

    Leaving it removes it unless the journal holds something that can be gone on with; an error
    then says so. root, model, scratch: see above; records: of the journal, but the first.
    """

    def __init__(self, out: Path, folder: Path | None = None):
        self.out = Path(os.path.abspath(out))
        self.root = folder or place(self.out)
        self.model, self.scratch = self.root / "model", self.root / "scratch"
        self.overwrite = False  # whether an older output may be replaced
        self.kept = ""  # what the journal holds, in words, once this run may go on with it
        self._replaced = self.root / "replaced"
        self._inputs: Mapping[str, Any] | None = None
        self._held = Held(self.root, LOCK)

    def __enter__(self) -> Work:
        self._held.enter()
        try:
            self._refuse_others()
            self.journal = Journal(self.root / JOURNAL)
            if self.journal.damaged and not self.journal.records:
                raise InputError(f"{self.journal.damaged} in {self.root}; remove that folder")
            if self._replaced.exists() and not self.out.exists():  # killed between two renames
                os.replace(self._replaced, self.out)
        except BaseException:
            self._held.leave()
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and self.kept:
            add_note(
                error, f"kept in {self.root.name}: {self.kept}; the same command goes on from there"
            )
        if self.root.exists():
            if self._worth_keeping:
                for folder in (self.scratch, self.model):
                    shutil.rmtree(folder, ignore_errors=True)
            else:
                self.remove()
        self._held.leave()

    @property
    def records(self) -> list[dict[str, Any]]:
        return [record for record in self.journal.records if record["kind"] != _BEGIN]

    @property
    def inputs(self) -> Mapping[str, Any] | None:
        """What the run that was stopped was made of, None where there was none."""
        return next((r["inputs"] for r in self.journal.records if r["kind"] == _BEGIN), None)

    def begin(self, inputs: Mapping[str, Any], *, restart: bool = False) -> dict[str, Any] | None:
        """Go on with what is there, or begin anew. Where this very run was killed after its output
        took its place, what publish() was told comes back and nothing is left to do.

        UsageError tells all differences between what the run that was stopped was made of and what
        this one is made of.
        """
        held = self.inputs
        same = held == inputs and not restart
        if self._published():
            if same:
                return self.journal.records[-1]
            self.clear()
        elif not same and not restart and self.records:
            raise UsageError(
                f"{self.root} holds a run that was stopped, and since then "
                f"{difference(held or {}, inputs)}; --restart begins anew, and with what it was "
                "before the run goes on"
            )
        self._inputs = inputs
        if not same:
            self.anew()
        for folder in (self.scratch, self.model):
            _remove(folder)
        self.scratch.mkdir()
        if self._worth_keeping:
            self.kept = "what an earlier run has done"
        return None

    @property
    def _worth_keeping(self) -> bool:
        return any(record["kind"] in _WORTH for record in self.journal.records)

    def _published(self) -> bool:
        """Whether the output is in its place and the run was killed before it removed this."""
        last = self.journal.records[-1] if self.journal.records else {}
        if last.get("kind") != _PUBLISH or self.model.exists():
            return False
        with contextlib.suppress(OSError):
            return describe(self.out / _PROOF) == last["proof"]
        return False

    # ---- what is kept ----

    def anew(self) -> None:
        """Forget all records but the first."""
        self.clear()
        self.journal.append({"kind": _BEGIN, "inputs": dict(self._inputs or {})})
        sync(self.root)

    def keep(self, name: str, write: Callable[[Path], Any]) -> dict[str, Any]:
        """Have write(path) make a file and keep it; its size and BLAKE2b, for a record."""
        return put(self.root / name, write)

    def commit(self, record: Mapping[str, Any]) -> None:
        """Append a record, whose files are kept, for good."""
        sync(self.root)
        self.journal.append(record)

    def good(self, files: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether files are what their record says of them."""
        for name, told in files.items():
            path = self.root / name
            if path.parent != self.root or path.is_symlink() or not path.is_file():
                return False
            if path.stat().st_size != told["size"] or describe(path) != told:
                return False
        return True

    def drop(self, name: str) -> None:
        """Forget a file that no record needs any more."""
        (self.root / name).unlink(missing_ok=True)

    def tidy(self, wanted: Collection[str]) -> None:
        """Remove files that are neither ours nor wanted: what a run that was killed left."""
        known = {LOCK, JOURNAL, self.scratch.name, *wanted}
        for path in self.root.iterdir():
            if path.name not in known:
                _remove(path)

    @property
    def nbytes(self) -> int:
        """Bytes of the files that are kept."""
        return sum(path.stat().st_size for path in self.root.iterdir() if path.is_file())

    # ---- the ends ----

    def publish(self, told: Mapping[str, Any]) -> None:
        """Put model/ in the place of the output, an older one is replaced; remove the work folder.

        told: what a later run is to know of this one if it is killed in between. InputError, and
        everything is kept, when somebody put something else there while the run was at work.
        """
        check_output(self.out, overwrite=self.overwrite)
        sync_all(self.model)
        self.commit({"kind": _PUBLISH, "proof": describe(self.model / _PROOF), **told})
        _remove(self._replaced)
        put_in_place(self.model, self.out, self._replaced)
        sync(self.out.parent)
        self.remove()

    def clear(self) -> None:
        """Begin anew: what the records name goes first, then they go."""
        for folder in (self.scratch, self.model):
            shutil.rmtree(folder, ignore_errors=True)
        self.tidy(())
        self.drop(JOURNAL)
        self.journal = Journal(self.root / JOURNAL)

    def remove(self) -> None:
        """All of it; the journal last, so that whoever comes next knows what the rest is."""
        last = (JOURNAL, LOCK)
        for path in self.root.iterdir():
            if path.name not in last:
                _remove(path)
        for name in last:
            self.drop(name)
        with contextlib.suppress(OSError):  # another run has begun in it
            self.root.rmdir()

    def _refuse_others(self) -> None:
        """InputError for what no run of ours leaves in such a folder."""
        inside = list(self.root.iterdir())
        link = next((path for path in inside if path.is_symlink()), None)
        if link is not None:
            raise InputError(f"{link} is in the way: a run of ours makes no links")
        names = {path.name for path in inside}
        if names - {LOCK, self.scratch.name} and JOURNAL not in names:
            raise InputError(f"{self.root} is in the way: it is no folder of a run of ours")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
