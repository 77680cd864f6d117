"""The JSON of the quality bench: settings, one record per row and seed, what can be kept of it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass
class Store:
    """Records by (row key, seed); seed None where calibration does not matter.

    settings: what every record was made under (a resumed run needs equal ones). about: versions,
    machine, date. missing: rows that could not be made, with the reason. timing: see quality.py.
    """

    settings: Record
    about: Record
    dense: Record = field(default_factory=dict)
    records: dict[tuple[str, int | None], Record] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    timing: Record = field(default_factory=dict)
    path: Path | None = None

    def has(self, key: str, seed: int | None, code: str) -> bool:
        """Whether a record is there that this code made."""
        return self.records.get((key, seed), {}).get("code") == code

    def seeds(self, key: str) -> dict[int | None, Record]:
        return {seed: record for (k, seed), record in self.records.items() if k == key}

    def put(self, record: Record) -> None:
        """Add a record and write the file."""
        self.records[record["row"], record["seed"]] = record
        self.missing.pop(record["row"], None)
        self.save()

    def save(self) -> None:
        """Write the file in one move, one record a line; nothing without a path."""
        if self.path is None:
            return
        head = {"settings": self.settings, "about": self.about, "dense": self.dense}
        head |= {"missing": self.missing, "timing": self.timing}
        lines = [f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in head.items()]
        each = ",\n ".join(json.dumps(r, ensure_ascii=False) for r in self.records.values())
        body = "{\n" + ",\n".join(lines) + ',\n"records": [\n ' + each + "\n]}\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(body, encoding="utf-8")
        os.replace(part, self.path)


def read(path: Path) -> Store:
    """The store in a file, as save() wrote it; SystemExit for a file of another kind."""
    body = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(body, dict) or "records" not in body:
        raise SystemExit(f"{path.name} holds no records of this bench")
    records = {(r["row"], r["seed"]): r for r in body.pop("records")}
    return Store(**body, records=records, path=path)


def start(path: Path | None, settings: Record, about: Record, resume: bool) -> Store:
    """A new store, or the one in the file when the run goes on under equal settings.

    SystemExit when a file is there and resume was not asked for, or when settings differ.
    """
    if path is None or not path.exists():
        return Store(settings, about, path=path)
    if not resume:
        raise SystemExit(f"{path.name} exists: --resume goes on with it, or move it away")
    store = read(path)
    differ = [
        f"{name} ({store.settings.get(name)} there, {settings.get(name)} now)"
        for name in {**store.settings, **settings}
        if store.settings.get(name) != settings.get(name)
    ]
    if differ:
        raise SystemExit(f"{path.name} was made under other settings: {', '.join(differ)}")
    store.about = about
    return store
