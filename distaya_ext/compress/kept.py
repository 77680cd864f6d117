"""What every process of a run keeps of its layers: the hidden states of its own windows.

Rank 0 keeps all the rest, see keep.Keeper. Files are by the number of the chunk among all of them,
so a later run may have another number of processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..ranks import team
from ..resume import Guest, Work
from .report import restore_report

if TYPE_CHECKING:
    from .packing import Packing
    from .replay import Replay
    from .report import Report


class Kept:
    """first: the layer that this run begins with; what the layers before it have left."""

    def __init__(self, work: Work | Guest, report: Report, packing: Packing):
        self.work, self.report, self.packing = work, report, packing
        self.replay: Replay | None = None
        self.first = 0
        self._state: dict[str, Any] = {}

    def restore(self, replay: Replay | None) -> None:
        """Give report, packing and replay what the layers before have left."""
        self.replay = replay
        if not self.first:
            return
        restore_report(self.report, self._state["report"])
        self.packing.restore(self._state["packing"])
        if replay is None:
            return
        device, before = replay.mixture.shares.device, replay.calibration.first_chunk
        for name, store in _streams(replay).items():
            facts = self._state["streams"].get(name, [])
            own = facts[before : before + len(replay.calls)]  # none where no layer is left to do
            for chunk, (shape, dtype) in enumerate(own):
                path = self.work.root / _stream_file(name, self.first - 1, before + chunk)
                store.load(("hidden", chunk), path, shape, getattr(torch, dtype), device)
        replay.mixture.restore(self._state["mixture"])

    def keep_streams(self, layer: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Keep what the layer behind this one reads: (file -> size and hash, stream -> shape and
        dtype of every chunk), of all processes together.
        """
        files: dict[str, Any] = {}
        facts: dict[str, list[Any]] = {}
        for name, store in _streams(self.replay).items():
            facts[name] = []
            for chunk in range(len(self.replay.calls)):
                key = ("hidden", chunk)
                file = _stream_file(name, layer, self.replay.calibration.first_chunk + chunk)
                files[file] = self.work.keep(file, lambda path, s=store, k=key: s.save(k, path))
                facts[name].append(store.facts(key))
        told = team().gather([files, facts])
        files = {name: about for each, _ in told for name, about in each.items()}
        return files, {name: [one for _, each in told for one in each[name]] for name in facts}


class Follower(Kept):
    """What a process keeps that is not the first: it does as rank 0 says. As keep.Keeper."""

    writer = None
    seconds = 0.0

    def find(self) -> None:
        self.first, self._state = team().tell()

    def tensors(self) -> None:
        """Rank 0 alone has them."""

    def due(self, layer: int) -> bool:
        return team().tell()

    def save(self, layer: int) -> None:
        if team().tell():
            self.keep_streams(layer)


def _streams(replay: Replay) -> dict[str, Any]:
    found = {"hidden": replay.hidden}
    return found if replay.dense is None else {**found, "dense": replay.dense[0]}


def _stream_file(name: str, layer: int, chunk: int) -> str:
    return f"{name}-{layer:05d}-{chunk:05d}.bin"
