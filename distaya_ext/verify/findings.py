"""What verify() found: one line per thing that is wrong, and what was looked at."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import InputError


@dataclass(frozen=True)
class Finding:
    """check: which look found it; where: a file or a module; what: a sentence."""

    check: str
    where: str
    what: str


@dataclass
class Findings:
    """found: what is wrong. looked: how many files, tensors, ... were looked at, by kind; notes:
    what could not be looked at, which is nothing wrong by itself.
    """

    folder: str
    found: list[Finding] = field(default_factory=list)
    looked: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    manifest: bool = False
    quick: bool = False

    @property
    def ok(self) -> bool:
        return not self.found

    def add(self, check: str, where: str, what: str) -> None:
        self.found.append(Finding(check, where, what))

    def sentence(self) -> str:
        """All of it in one."""
        looked = ", ".join(f"{count} {kind}" for kind, count in self.looked.items())
        if self.ok:
            return f"{self.folder} is whole: {looked}"
        kinds = ", ".join(
            f"{n} {check}" for check, n in Counter(f.check for f in self.found).items()
        )
        first = self.found[0]
        s = "s" * (len(self.found) != 1)
        return (
            f"{self.folder} has {len(self.found)} fault{s} ({kinds}), first: {first.where}: "
            f"{first.what}"
        )

    def refuse(self) -> None:
        """InputError when something is wrong."""
        if self.found:
            raise InputError(self.sentence())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "folder": self.folder,
            "ok": self.ok,
            "manifest": self.manifest,
            "quick": self.quick,
            "looked": dict(self.looked),
            "notes": self.notes,
            "found": [asdict(each) for each in self.found],
        }
