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
from .capture import Calls, fill_layer, read_layer
from .packing import Packing
from .plan import Plan, groups
from .report import Report
from .solve import Figures, Statistic, solve
from .store import Store
from .walk import LayerWalk


class Replay:
    """The calibration tokens on their way: hidden states, what waits inside a layer, the calls."""

    def __init__(self, calibration: Calibration, hidden: Store, tape: Store):
        self.calibration, self.hidden, self.tape = calibration, hidden, tape
        self.calls = Calls()


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
            walk = LayerWalk(layer, self.architecture, calls, replay.hidden, replay.tape, checks)
        changed: dict[str, dict[str, torch.Tensor]] = {}
        for stage in self.architecture.stages:
            stacks = groups(self.plan, prefix, stage.names)
            if stacks:
                given = (replay.calibration, walk) if walk is not None else None
                self._stage(index, layer, given, stage, stacks, checks, way, changed)
            if walk is not None:
                walk.release(stage)
        way.do(lambda: self._write(prefix, changed, writer))
        if walk is not None:
            walk.finish()
        end = way.mark()
        rest = way.home(checks.take())

        def judge() -> float:
            ferry.judge(rest())
            return way.seconds(begin, end)

        way.do(judge, lambda seconds: self.on_event(events.LayerDone(index, self.count, seconds)))

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
        given: tuple[Calibration, LayerWalk] | None,
        stage: Stage,
        stacks: list[list[str]],
        checks: ferry.Checks,
        way: ferry.Ferry,
        changed: dict[str, dict[str, torch.Tensor]],
    ) -> None:
        """Gather the statistic of a stage and solve its stacks, one after the other.

        changed gets what the file will hold, module -> suffix -> tensor, when it is at home.
        """
        begin = way.mark()
        prefix = f"{self.architecture.layers}.{index}"
        statistic = None
        if given is not None:
            columns = layer.get_submodule(stage.names[0]).weight.shape[1]
            settings = self.plan[f"{prefix}.{stacks[0][0]}"]
            statistic = Statistic(settings.statistic, columns, way.device, readers=len(stacks))
            self._gather(*given, stage, f"{prefix}.{stacks[0][0]}", checks, statistic)
        for names in stacks:
            account = partial(self.report.account, index, prefix, again=names is not stacks[0])
            begin = self._stack(
                prefix, layer, names, statistic, checks, way, changed, begin, account
            )

    def _stack(
        self,
        prefix: str,
        layer: nn.Module,
        names: list[str],
        statistic: Statistic | None,
        checks: ferry.Checks,
        way: ferry.Ferry,
        changed: dict[str, dict[str, torch.Tensor]],
        begin: Any,
        account: Callable[..., events.StageDone],
    ) -> Any:
        """Solve Linears of the same settings as one stack and put the new weights into the layer.

        begin is when the work on them began; returns when it ended. account notes what came out.
        """
        where = f"{prefix}.{names[0]}"
        settings = self.plan[where]
        weights = [layer.get_submodule(name).weight.data for name in names]
        shapes = {name: tuple(W.shape) for name, W in zip(names, weights, strict=True)}
        solution = solve(weights, settings, statistic, checks)
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

        way.do(settle, lambda told: self.on_event(account(shapes, settings, *told)))
        return end

    def _gather(
        self,
        calibration: Calibration,
        walk: LayerWalk,
        stage: Stage,
        where: str,
        checks: ferry.Checks,
        statistic: Statistic,
    ) -> None:
        def sink(chunk: int, x: torch.Tensor) -> None:
            check_activations(x, chunk, where, calibration, checks)
            statistic.add(x.reshape(-1, x.shape[-1]))

        walk.gather(stage, sink)

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
