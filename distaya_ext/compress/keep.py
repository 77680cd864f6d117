"""What a run keeps of its layers, so that the same command goes on behind the last of them.

After a layer: the tensors that were added since the last time and are in no shard yet
(layer-*.safetensors), the streams that the next layer reads (hidden-* and dense-*, raw), and all
else that carries on (state-*.json: the report, what packing counted, the mixture's weights). A
shard is kept as soon as it is full; files whose tensors are all in shards go then.

On the disk beside the output that grows there, at most: the files of one shard's tensors twice,
and two layers' streams; see most_bytes().
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import Checkpoint, write_tensors
from ..ranks import team
from ..resume import Work
from . import events, ferry
from .budget import Needs
from .kept import Kept
from .report import dump_report
from .shards import Shards

if TYPE_CHECKING:
    from .packing import Packing
    from .report import Report

SHARE = 0.1  # of a run's time that keeping may take before a layer is left out
_STATE = "state"


class Keeper(Kept):
    """Keeps what a run has done, and finds what an earlier one had.

    Order of use: find(); restore() once the replay is there; tensors(); then due() and save()
    after each layer.
    """

    def __init__(
        self,
        work: Work,
        report: Report,
        packing: Packing,
        shard_bytes: int,
        layers: int,
        on_event: Callable[[events.Event], None],
    ):
        super().__init__(work, report, packing)
        self.count, self.on_event = layers, on_event
        self.writer = Shards(work, shard_bytes)
        self._records: list[dict[str, Any]] = []  # of the layers before that
        self._checked: dict[str, bool] = {}  # files of layers: whether they are what they were
        self._generations: list[list[str]] = []  # what only one kept layer needs, older ones first
        self._start, self._spent, self._before = time.perf_counter(), 0.0, 0.0

    @property
    def seconds(self) -> float:
        """How long this run and those that were stopped before it took."""
        return self._before + time.perf_counter() - self._start

    # ---- going on ----

    def find(self) -> None:
        """Look for the last layer that everything is there of; say so, and what is lost."""
        shards, layers = self._read()
        good, had = [], len(layers)
        for index in range(len(shards)):
            if index not in shards or not self.work.good(shards[index]["files"]):
                break
            good.append(shards[index])
        in_shards = {name for record in good for name in record["names"]}
        while layers and not self._whole(layers, in_shards):
            layers.pop()
        self._found(good, layers)
        if len(layers) < had or len(good) < len(shards) or self.work.journal.damaged:
            self._say_lost()
            if good or layers:
                self.work.commit({"kind": "back", "layers": len(layers), "shards": len(good)})
            else:
                self.work.anew()
        self.work.tidy(self._wanted(good, layers))
        team().tell([self.first, self._state])

    def _read(self) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
        """The records that hold: shards by index, layers in order."""
        shards: dict[int, dict[str, Any]] = {}
        layers: list[dict[str, Any]] = []
        for record in self.work.records:
            match record["kind"]:
                case "shard":
                    shards[record["index"]] = record
                case "layer":
                    layers.append(record)
                case "back":
                    del layers[record["layers"] :]
                    shards = {k: v for k, v in shards.items() if k < record["shards"]}
        return shards, layers

    def _whole(self, layers: list[dict[str, Any]], in_shards: set[str]) -> bool:
        """Whether the last of them can be gone on from."""
        for record in layers:
            missing = set(record["names"]) - in_shards
            if missing and not (missing.issubset(record["held"]) and self._good(record["tensors"])):
                return False
        return self._good(layers[-1]["files"])

    def _good(self, files: dict[str, Any]) -> bool:
        """Work.good, each file looked at once."""
        for name, told in files.items():
            if name not in self._checked:
                self._checked[name] = self.work.good({name: told})
        return all(self._checked[name] for name in files)

    def _found(self, shards: list[dict[str, Any]], layers: list[dict[str, Any]]) -> None:
        for record in shards:
            self.writer.restore(record)
        self._records = layers
        if not layers:
            return
        self.first = layers[-1]["layer"] + 1
        self._generations = [list(layers[-1]["files"])]
        file = self.work.root / f"{_STATE}-{layers[-1]['layer']:05d}.json"
        self._state = json.loads(file.read_text(encoding="utf-8"))
        self._before = self._state["seconds"]
        self.work.kept = self._told(self.first)
        self.on_event(events.Resumed(self.first, self.count))
        threads = torch.get_num_threads()
        if self._state["threads"] != threads:
            self.on_event(
                events.Notice(
                    f"the layers before were made with {self._state['threads']} threads and this "
                    f"run has {threads}, so it may end with other last bits"
                )
            )

    def _say_lost(self) -> None:
        self.on_event(
            events.Notice(
                f"some of what was kept in {self.work.root.name} is not what it was"
                + (f" ({self.work.journal.damaged})" if self.work.journal.damaged else "")
                + f"; done again from layer {self.first + 1} of {self.count}"
            )
        )

    def _wanted(self, shards: list[dict[str, Any]], layers: list[dict[str, Any]]) -> set[str]:
        files = {name for record in shards for name in record["files"]}
        files |= {name for record in layers for name in record["tensors"]}
        return files | set(layers[-1]["files"] if layers else ())

    def tensors(self) -> None:
        """Give the writer what the layers before have written, in the order they did."""
        from safetensors import safe_open

        for record in self._records:
            missing = [name for name in record["names"] if not self.writer.holds(name)]
            for file in record["tensors"] if missing else ():
                self.writer.layers[file] = missing
                with safe_open(self.work.root / file, framework="pt") as held:
                    for name in missing:
                        self.writer.add(name, held.get_tensor(name))
        self.writer.names.clear()

    # ---- keeping ----

    def due(self, layer: int) -> bool:
        """Whether to keep what there is after a layer: after the first of a run, and after the
        last, always; after others while keeping has taken at most SHARE of the time.
        """
        now = time.perf_counter() - self._start
        always = layer in (self.first, self.count - 1)
        return team().tell(always or self._spent <= SHARE * now)

    def save(self, layer: int) -> None:
        """Keep it. Everything of the layer is at home, and nothing of the next has begun."""
        begin = time.perf_counter()
        while len(self._generations) > 1:
            for name in self._generations.pop(0):
                self.work.drop(name)
        keep, number = self.work.keep, f"{layer:05d}"
        tensors, waiting = {}, self.writer.waiting()
        if waiting:
            name = f"layer-{number}.safetensors"
            tensors[name] = keep(name, lambda path: write_tensors(waiting, path))
            self.writer.layers[name] = list(waiting)
        files, shapes = {}, {}
        if team().tell(self.replay is not None and layer + 1 < self.count):
            files, shapes = self.keep_streams(layer)
        text = json.dumps(self._carried(shapes))
        file = f"{_STATE}-{number}.json"
        files[file] = keep(file, lambda path: path.write_text(text, encoding="utf-8"))
        told = {"layer": layer, "names": self.writer.names, "held": list(waiting)}
        self.work.commit({"kind": "layer", **told, "tensors": tensors, "files": files})
        self._generations.append(list(files))
        self.writer.names = []
        self.work.kept = self._told(layer + 1)
        self._spent += time.perf_counter() - begin

    def _carried(self, streams: dict[str, Any]) -> dict[str, Any]:
        return {
            "report": dump_report(self.report),
            "packing": self.packing.state(),
            "mixture": None if self.replay is None else self.replay.mixture.state(),
            "streams": streams,
            "seconds": self.seconds,
            "threads": torch.get_num_threads(),
        }

    def _told(self, done: int) -> str:
        return f"{done} of {self.count} layers"


def after_layer(keeper: Keeper | None, layer: int, way: ferry.Ferry) -> None:
    """Turn to the next layer; where what there is is to be kept, once all of it is at home."""
    if keeper is None or not keeper.due(layer):
        way.turn()
        return
    way.land()
    keeper.save(layer)


def most_bytes(checkpoint: Checkpoint, tokens: int, needs: Needs, shard: int, output: int) -> int:
    """The most bytes on the disk that keeping takes beside an output of so many bytes.

    Tensors of at most two shards, and hidden states of all tokens twice: those of the layer before
    go when those of this one are there.
    """
    width = checkpoint.config.hidden_size * checkpoint.dtype.itemsize
    return min(output, 2 * shard) + 2 * (1 + needs.twin) * tokens * width
