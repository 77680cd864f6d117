"""Shards of a run that can be gone on with: each is kept and recorded as soon as it is full."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import ShardWriter, part_name
from ..resume import Work


class Shards(ShardWriter):
    """Writes shards into the work folder, each kept and recorded as soon as it is full."""

    def __init__(self, work: Work, shard_bytes: int):
        super().__init__(work.model, shard_bytes)
        self.work, self.parts = work, work.root
        self.names: list[str] = []  # added since the last layer was kept
        self.layers: dict[str, list[str]] = {}  # kept file of a layer -> its tensors
        self._there: set[str] = set()  # in a shard that was kept

    def restore(self, record: dict[str, Any]) -> None:
        """A shard that an earlier run has kept."""
        self._shards.append(record["names"])
        self._there.update(record["names"])
        self.total_bytes += record["bytes"]

    def holds(self, name: str) -> bool:
        return name in self._there

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.names.append(name)
        if name not in self._there:
            super().add(name, tensor)

    def waiting(self) -> dict[str, torch.Tensor]:
        """Tensors added since the last layer was kept that are in no shard."""
        return {name: self._pending[name] for name in self.names if name in self._pending}

    def _write_shard(self, path: Path) -> None:
        kept = self.work.keep(path.name, super()._write_shard)
        names, count = list(self._pending), len(self._shards)
        told = {"index": count, "names": names, "bytes": self._pending_bytes}
        self.work.commit({"kind": "shard", **told, "files": {path.name: kept}})
        self._there.update(names)
        for file, held in list(self.layers.items()):
            if self._there.issuperset(held):
                self.work.drop(file)
                del self.layers[file]

    def finish(self) -> list[Path]:
        self.folder.mkdir()
        return super().finish()

    def _place_shard(self, index: int, name: str) -> None:
        """Both names until the output is in its place: a run killed before does this again."""
        source, target = self.parts / part_name(index), self.folder / name
        try:
            os.link(source, target)
        except OSError:  # no links on this disk
            shutil.copyfile(source, target)
