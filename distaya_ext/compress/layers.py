"""One decoder layer after the other: read, compress, send home what the file holds, go on.

Nothing here reads a value: what must be looked at, reported and written goes through the ferry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from ..checkpoint import Checkpoint, ShardWriter
from . import events, ferry
from .at_work import AtWork
from .capture import fill_layer, read_layer
from .keep import Keeper, after_layer
from .languages import Account
from .packing import Packing
from .plan import Plan
from .replay import Replay
from .report import Report
from .twin import Twin
from .walk import LayerWalk


class Layers:
    """Compresses the layers of a run. replay None: the method looks at no tokens.

    plan holds the settings of every Linear that does not stay as it is.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        packing: Packing,
        report: Report,
        on_event: Callable[[events.Event], None],
    ):
        self.checkpoint, self.plan, self.packing = checkpoint, plan, packing
        self.report, self.on_event = report, on_event
        self.architecture = checkpoint.architecture
        self.count = checkpoint.config.num_hidden_layers

    def run(
        self,
        layers: nn.ModuleList,
        replay: Replay | None,
        way: ferry.Ferry,
        writer: ShardWriter | None,
        keeper: Keeper | None = None,
    ) -> None:
        """All of them; with a keeper those it has not kept from before. What they give is written,
        checked and reported when this returns. writer None: another process of the run writes.
        """
        todo = range(keeper.first if keeper is not None else 0, self.count)
        reads = (
            partial(read_layer, layers[index], self._prefix(index), self.checkpoint, shared=True)
            for index in todo
        )
        coming: Iterator[dict[str, torch.Tensor]] = way.ahead(reads)
        for index in todo:
            self._layer(index, layers[index], next(coming), replay, way, writer)
            after_layer(keeper, index, way)
        way.land()

    def _prefix(self, index: int) -> str:
        return f"{self.architecture.layers}.{index}"

    def _layer(
        self,
        index: int,
        weightless: nn.Module,
        weights: dict[str, torch.Tensor],
        replay: Replay | None,
        way: ferry.Ferry,
        writer: ShardWriter | None,
    ) -> None:
        begin = way.mark()
        way.do(lambda: None, lambda _: self.on_event(events.LayerStart(index, self.count)))
        prefix = self._prefix(index)
        layer = fill_layer(weightless, weights, way.device)
        walk = twin = None
        checks = ferry.Checks(way.late)
        if replay is not None:
            calls = [replay.calls.of(index, chunk) for chunk in range(len(replay.calls))]
            walk = LayerWalk(layer, self.architecture, calls, replay.hidden, replay.tape, checks)
            if replay.dense is not None:
                dense = fill_layer(weightless, weights, way.device)  # the same tensors
                twin = Twin(dense, walk, self.architecture, calls, *replay.dense)
        weights.clear()
        at_work = AtWork(self.plan, self.packing, self.report, self.on_event, way, checks)
        changed = at_work.compress(index, prefix, layer, self.architecture, replay, walk, twin)
        if writer is not None:
            way.do(lambda: self._write(prefix, changed, writer))
        told: dict[str, Any] = {}
        if walk is not None:
            walk.finish()
            if not way.late:
                replay.look_at_outputs(prefix, replay.hidden, "output")
            told = vars(replay.account())
        end = way.mark()
        rest = way.home((checks.take(), told, at_work.trained))

        def judge() -> tuple[float, dict[str, Any], dict[str, torch.Tensor] | None]:
            kept, told, trained = rest()
            ferry.judge(kept)
            return way.seconds(begin, end), told, trained

        def tell(found: tuple[float, dict[str, Any], dict[str, torch.Tensor] | None]) -> None:
            seconds, told, trained = found
            if trained is not None:
                self.report.note_training(index, prefix, trained)
            if told:
                languages = replay.mixture.languages
                event = self.report.languages.add(index, languages, Account(**told))
                if event.errors:
                    self.on_event(event)
            self.on_event(events.LayerDone(index, self.count, seconds))

        way.do(judge, tell)

    def _write(
        self, prefix: str, changed: dict[str, dict[str, torch.Tensor]], writer: ShardWriter
    ) -> None:
        """What the layer holds, unchanged tensors first, in the dtype they were stored in."""
        for name in self.checkpoint.entries:
            module, _, suffix = name.rpartition(".")
            new = changed.get(module, {})  # a quantised weight goes by other suffixes
            replaced = suffix in new or (suffix == "weight" and module in changed)
            if name.startswith(prefix + ".") and not replaced:
                writer.add(name, self.checkpoint.read([name])[name])
        while changed:
            name = next(iter(changed))
            writer.add_all(name, changed.pop(name))
