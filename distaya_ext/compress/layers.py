"""One decoder layer after the other: gather, solve, put back, and send home what the file holds.

Nothing here reads a value: what must be looked at, reported and written goes through the ferry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from ..checkpoint import Checkpoint, ShardWriter
from ..errors import InputError
from ..formats import Grid
from ..models import Stage
from . import events, ferry
from .calibrate import Calibration, check_activations
from .capture import Call, Calls, fill_layer, read_layer
from .languages import Account, Mixture
from .packing import Packing
from .report import Report
from .settings import Settings
from .solve import Figures, Statistic, solve
from .store import Store
from .walk import LayerWalk


class Replay:
    """The calibration tokens on their way: hidden states, what waits inside a layer, the calls.

    dense holds the hidden states of the uncompressed model; None where nothing asks for them.
    """

    def __init__(
        self,
        calibration: Calibration,
        hidden: Store,
        tape: Store,
        mixture: Mixture,
        dense: Store | None = None,
    ):
        self.calibration, self.hidden, self.tape = calibration, hidden, tape
        self.mixture, self.dense = mixture, dense
        self.calls = Calls()

    def advance(self, layer: nn.Module, calls: list[Call]) -> None:
        """Take the dense hidden states through a layer that still has its own weights."""
        with torch.no_grad():
            for chunk, call in enumerate(calls):
                key = ("hidden", chunk)
                self.dense.put(key, call.run(layer, self.dense.get(key)))

    def account(self) -> Account:
        """What the layer that has just been finished told of the languages."""
        if self.dense is not None:
            for chunk in range(len(self.calls)):
                key = ("hidden", chunk)
                self.mixture.observe(chunk, self.hidden.get(key), self.dense.get(key))
        return self.mixture.close_layer()


class Layers:
    """Compresses the layers of a run. replay None: the method looks at no tokens.

    skip holds full names of Linears that stay as they are.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: Settings,
        packing: Packing,
        skip: set[str],
        report: Report,
        on_event: Callable[[events.Event], None],
    ):
        self.checkpoint, self.settings, self.packing = checkpoint, settings, packing
        self.skip, self.report, self.on_event = skip, report, on_event
        self.architecture = checkpoint.architecture
        self.count = checkpoint.config.num_hidden_layers

    def run(
        self, layers: nn.ModuleList, replay: Replay | None, way: ferry.Ferry, writer: ShardWriter
    ) -> None:
        """All of them. What they give is written, checked and reported when this returns."""
        prefixes = [f"{self.architecture.layers}.{index}" for index in range(self.count)]
        reads = (
            partial(read_layer, layer, prefix, self.checkpoint)
            for layer, prefix in zip(layers, prefixes, strict=True)
        )
        coming: Iterator[dict[str, torch.Tensor]] = way.ahead(reads)
        for index, weightless in enumerate(layers):
            layer = fill_layer(weightless, next(coming), way.device)
            self._layer(index, layer, replay, way, writer)
            del layer
            way.turn()
        way.land()

    def _tell(self, way: ferry.Ferry, event: Callable[[], events.Event]) -> None:
        way.do(lambda: None, lambda _: self.on_event(event()))

    def _layer(
        self,
        index: int,
        layer: nn.Module,
        replay: Replay | None,
        way: ferry.Ferry,
        writer: ShardWriter,
    ) -> None:
        begin = way.mark()
        self._tell(way, lambda: events.LayerStart(index, self.count))
        prefix = f"{self.architecture.layers}.{index}"
        checks = ferry.Checks(way.late)
        walk = None
        if replay is not None:
            calls = [replay.calls.of(index, chunk) for chunk in range(len(replay.calls))]
            if replay.dense is not None:
                replay.advance(layer, calls)
            walk = LayerWalk(layer, self.architecture, calls, replay.hidden, replay.tape, checks)
        changed: dict[str, dict[str, torch.Tensor]] = {}
        for stage in self.architecture.stages:
            names = [name for name in stage.names if f"{prefix}.{name}" not in self.skip]
            if names:
                given = (replay, walk) if walk is not None else None
                self._stage(index, layer, given, stage, names, checks, way, changed)
            if walk is not None:
                walk.release(stage)
        way.do(lambda: self._write(prefix, changed, writer))
        told: dict[str, Any] = {}
        if walk is not None:
            walk.finish()
            told = vars(replay.account())
        end = way.mark()
        rest = way.home((checks.take(), told))

        def judge() -> tuple[float, dict[str, Any]]:
            kept, told = rest()
            ferry.judge(kept)
            return way.seconds(begin, end), told

        def tell(found: tuple[float, dict[str, Any]]) -> None:
            seconds, told = found
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
            if name.startswith(prefix + ".") and name.removesuffix(".weight") not in changed:
                writer.add(name, self.checkpoint.read([name])[name])
        while changed:
            name = next(iter(changed))
            writer.add_all(name, changed.pop(name))

    def _stage(
        self,
        index: int,
        layer: nn.Module,
        given: tuple[Replay, LayerWalk] | None,
        stage: Stage,
        names: list[str],
        checks: ferry.Checks,
        way: ferry.Ferry,
        changed: dict[str, dict[str, torch.Tensor]],
    ) -> None:
        """Gather the statistic of a stage, solve its stack, put the new weights into the layer.

        changed gets what the file will hold, module -> suffix -> tensor, when it is at home.
        """
        begin = way.mark()
        prefix = f"{self.architecture.layers}.{index}"
        where = f"{prefix}.{names[0]}"
        weights = [layer.get_submodule(name).weight.data for name in names]
        shapes = {name: tuple(W.shape) for name, W in zip(names, weights, strict=True)}
        statistic = None
        if given is not None:
            statistic = self._gather(*given, stage, where, checks, way.device, weights[0].shape[1])
        solution = solve(weights, self.settings, statistic, checks)
        del weights, statistic
        checks.finite(solution.W, partial(_not_finite, where))
        parts: dict[str, Any] = {}
        row = 0
        for name, rows in zip(
            names, solution.W.split([shape[0] for shape in shapes.values()]), strict=True
        ):
            layer.get_submodule(name).weight.data = rows.clone()
            full = f"{prefix}.{name}"
            parts[full] = {"weight": layer.get_submodule(name).weight.data}
            if full in self.packing.planned:
                grid = solution.grid.part(row, row + len(rows))
                parts[full] = self.packing.start(full, grid) if way.late else grid
            row += len(rows)
        end = way.mark()
        come = way.home((parts, vars(solution.figures), checks.take()))
        del parts, solution

        def settle() -> tuple[Figures, float, list[int]]:
            parts, figures, kept = come()
            ferry.judge(kept)
            for name, part in parts.items():
                changed[name] = self._stored(name, shapes[name[len(prefix) + 1 :]], part)
            sizes = [sum(t.nbytes for t in changed[name].values()) for name in parts]
            return Figures(**figures), way.seconds(begin, end), sizes

        def account(told: tuple[Figures, float, list[int]]) -> None:
            self.on_event(self.report.account(index, prefix, shapes, *told))

        way.do(settle, account)

    def _gather(
        self,
        replay: Replay,
        walk: LayerWalk,
        stage: Stage,
        where: str,
        checks: ferry.Checks,
        device: torch.device,
        columns: int,
    ) -> Statistic:
        statistic = Statistic(self.settings.statistic, columns, device)

        def sink(chunk: int, x: torch.Tensor) -> None:
            check_activations(x, chunk, where, replay.calibration, checks)
            statistic.add(x.reshape(-1, x.shape[-1]), replay.mixture.gather(where, chunk, x))

        walk.gather(stage, sink)
        return statistic

    def _stored(self, name: str, shape: tuple[int, int], part: Any) -> dict[str, torch.Tensor]:
        """What the file holds of a module, from what came home of it."""
        if isinstance(part, Grid):
            return self.packing.encode(name, part)
        if name in self.packing.planned:
            return self.packing.finish(name, *shape, part)
        return part


def _not_finite(where: str) -> None:
    raise InputError(
        f"the compressed weights of {where} are not finite; raise damp or give more texts"
    )
