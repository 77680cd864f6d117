"""One decoder layer at work: gather, solve, put back, and start sending home what was made of it.

Nothing here reads a value: what must be looked at, reported and written goes through the ferry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..formats import Grid
from ..models import Architecture, Stage
from ..ranks import Sum, team
from . import events, ferry, glu
from .aim import Aim
from .bias import Means, corrected
from .blocks import trim
from .calibrate import check_activations
from .packing import Packing
from .plan import Plan, groups
from .reconstruct import Course, reconstruct
from .replay import Replay
from .report import Report
from .settings import Settings
from .solve import Figures, solve
from .statistic import Statistic
from .twin import Twin
from .walk import LayerWalk


@dataclass
class Stack:
    """Linears of one stage and the same settings, solved together. grids: of those that were
    rounded to groups of neighbouring columns; masks: of those that a sweep pruned.
    """

    names: list[str]
    settings: Settings
    shapes: dict[str, tuple[int, int]]
    figures: Figures
    grids: dict[str, Grid]
    masks: dict[str, torch.Tensor] | None
    begin: Any
    end: Any
    again: bool  # not the first of its stage


class AtWork:
    """Compresses the Linears of one layer after the other; the rest of the run is given once."""

    def __init__(
        self,
        plan: Plan,
        packing: Packing,
        report: Report,
        on_event: Callable[[events.Event], None],
        way: ferry.Ferry,
        checks: ferry.Checks,
    ):
        self.plan, self.packing, self.report, self.on_event = plan, packing, report, on_event
        self.way, self.checks = way, checks
        # What reconstruct() returned, None where nothing was to be trained.
        self.trained: dict[str, torch.Tensor] | None = None
        self.mlp: glu.GatedMLP | None = None  # where method dass prunes the layer

    def compress(
        self,
        index: int,
        prefix: str,
        layer: nn.Module,
        architecture: Architecture,
        replay: Replay | None,
        walk: LayerWalk | None,
        twin: Twin | None,
    ) -> dict[str, dict[str, torch.Tensor]]:
        """Give the layer its final weights, stage by stage.

        Returns what the file will hold, module -> suffix -> tensor, complete when it is at home.
        """
        changed: dict[str, dict[str, torch.Tensor]] = {}
        held: list[Stack] = []
        self.mlp = glu.of(prefix, layer, self.plan, self.checks)
        trains = twin is not None and self._trains(prefix, architecture)
        for stage in architecture.stages:
            stacks = groups(self.plan, prefix, stage.names)
            if stacks:
                done = self._stage(prefix, layer, stage, stacks, replay, walk, twin)
                for stack in done:
                    if trains:
                        held.append(stack)
                    else:
                        self._send(index, prefix, layer, stack, changed)
            if walk is not None:
                walk.release(stage)
            if twin is not None:
                twin.release(stage)
            self._rest()
        if twin is not None:
            twin.finish()
            if not self.checks.late:
                replay.look_at_outputs(prefix, replay.dense[0], "dense output")
        if trains and held:
            walk.step_aside()
            self.trained = self._train(layer, held, replay.course(index))
            for stack in held:
                self._send(index, prefix, layer, stack, changed)
        return changed

    def _train(
        self, layer: nn.Module, held: list[Stack], course: Course
    ) -> dict[str, torch.Tensor]:
        return reconstruct(layer, held, course)

    def _rest(self) -> None:
        """Between stages: what is free goes back."""
        trim()

    def _trains(self, prefix: str, architecture: Architecture) -> bool:
        names = (f"{prefix}.{name}" for name in architecture.linears())
        return any(self.plan[name].quality == "high" for name in names if name in self.plan)

    def _stage(
        self,
        prefix: str,
        layer: nn.Module,
        stage: Stage,
        stacks: list[list[str]],
        replay: Replay | None,
        walk: LayerWalk | None,
        twin: Twin | None,
    ) -> list[Stack]:
        """Gather the statistic of a stage and solve its stacks, one after the other."""
        begin = self.way.mark()
        statistic = None
        if replay is not None:
            settings = self.plan[f"{prefix}.{stacks[0][0]}"]
            rows, columns = layer.get_submodule(stage.names[0]).weight.shape
            aim, wanted = None, 0
            if twin is not None and settings.aims:
                aim = Aim(rows, columns, self.way.device, outputs=twin.ends(stage))
                wanted = rows if aim.outputs else columns
            statistic = Statistic(
                settings.statistic,
                columns,
                self.way.device,
                aim=aim,
                means=self._means(layer, stage, settings, columns, wanted),
                readers=len(stacks) + (self.mlp is not None and self.mlp.sweeps_twice),
            )
            self._gather(f"{prefix}.{stacks[0][0]}", stage, replay, walk, twin, statistic)
        done = []
        for names in stacks:
            done.append(self._solve(prefix, layer, names, statistic, begin))
            done[-1].again, begin = names is not stacks[0], done[-1].end
        return done

    def _means(
        self, layer: nn.Module, stage: Stage, settings: Settings, columns: int, wanted: int
    ) -> Means | None:
        if not settings.bias_correction:
            return None
        biased = any(layer.get_submodule(name).bias is not None for name in stage.names)
        return Means(columns, self.way.device, wanted) if biased else None

    def _gather(
        self,
        where: str,
        stage: Stage,
        replay: Replay,
        walk: LayerWalk,
        twin: Twin | None,
        statistic: Statistic,
    ) -> None:
        def add(chunk: int, x: torch.Tensor, wanted: torch.Tensor | None = None) -> None:
            alive = None
            if self.checks.late:
                check_activations(x, chunk, where, replay.calibration, self.checks)
            else:
                parts = [x] if wanted is None else [x, wanted]
                alive = replay.left_out.look(where, chunk, parts, replay, walk)
            if alive is not None:
                x = x.masked_fill(~alive[:, None, None], 0)
            weights = replay.mixture.gather(where, chunk, x)
            if alive is not None:
                x, wanted = x[alive], None if wanted is None else wanted[alive]
                weights = None if weights is None else weights.view(len(alive), -1)[alive].flatten()
            flat = None if wanted is None else wanted.flatten(0, -2)
            statistic.add(x.reshape(-1, x.shape[-1]), flat, weights)
            if self.mlp is not None:
                self.mlp.see(stage, x)
            if replay.calibration.closes(chunk):
                adding.close()

        adding = replay.adding(self._sums(where, stage, replay, statistic))
        if statistic.aim is not None:
            for chunk, x, wanted in twin.pairs(stage):
                add(chunk, x, wanted)
        else:
            for chunk, x in walk.gather(stage):
                add(chunk, x)
        if not self.checks.late:
            replay.left_out.share()
        adding.finish()
        statistic.count(replay.alive_tokens)
        if self.mlp is not None:
            self.mlp.count(stage, replay.alive_tokens)

    def _sums(self, where: str, stage: Stage, replay: Replay, statistic: Statistic) -> list[Sum]:
        """All that is added to while a stage is gathered."""
        found = statistic.sums(weighted=replay.mixture.weighted)
        found += replay.mixture.input_sums(where, statistic.columns, self.way.device)
        return found if self.mlp is None else found + self.mlp.sums(stage)

    def _solve(
        self,
        prefix: str,
        layer: nn.Module,
        names: list[str],
        statistic: Statistic | None,
        begin: Any,
    ) -> Stack:
        """Solve Linears of the same settings as one stack and put the new weights into the layer.

        begin is when the work on them began.
        """
        where = f"{prefix}.{names[0]}"
        settings = self.plan[where]
        masks = self.mlp.masks(names, statistic) if self.mlp is not None else None
        weights = [layer.get_submodule(name).weight.data for name in names]
        shapes = {name: tuple(W.shape) for name, W in zip(names, weights, strict=True)}
        means = None if statistic is None else statistic.means
        outputs = statistic is not None and statistic.aim is not None and statistic.aim.outputs
        solution = solve(weights, settings, statistic, self.checks, masks)
        del statistic, masks
        self.checks.finite(solution.W, partial(_not_finite, where))
        grids: dict[str, Grid] = {}
        masks = {} if solution.mask is not None else None
        row = 0
        for W, (name, (rows, _)) in zip(weights, shapes.items(), strict=True):
            part = slice(row, row + rows)
            linear = layer.get_submodule(name)
            linear.weight.data = solution.W[part].clone()
            if means is not None and linear.bias is not None:
                b, Q = linear.bias.data, linear.weight.data
                linear.bias.data = corrected(b, W, Q, means, outputs=outputs)
            if solution.grid is not None:
                grids[name] = solution.grid.part(row, row + rows)
            if masks is not None:
                masks[name] = solution.mask[part]
            row += rows
        end = self.way.mark()
        return Stack(names, settings, shapes, solution.figures, grids, masks, begin, end, False)

    def _send(
        self,
        index: int,
        prefix: str,
        layer: nn.Module,
        stack: Stack,
        changed: dict[str, dict[str, torch.Tensor]],
    ) -> None:
        """Start the way home of what a stack became; it is encoded and accounted for there."""
        parts: dict[str, Any] = {}
        moved: dict[str, dict[str, torch.Tensor]] = {}
        names = stack.names if team().first else []  # of the one that writes
        for name in names:
            full = f"{prefix}.{name}"
            parts[full] = {"weight": layer.get_submodule(name).weight.data}
            if full in self.packing.planned:
                grid = stack.grids[name]
                parts[full] = self.packing.start(full, grid) if self.way.late else grid
            linear = layer.get_submodule(name)
            if stack.settings.bias_correction and linear.bias is not None:
                moved[full] = {"bias": linear.bias.data}
            elif self.mlp is not None:
                moved[full] = self.mlp.moved(name)
        come = self.way.home((parts, moved, vars(stack.figures), self.checks.take()))
        shapes, settings, begin, end = stack.shapes, stack.settings, stack.begin, stack.end
        account = partial(self.report.account, index, prefix, again=stack.again)

        def settle() -> tuple[Figures, float, list[int]]:
            parts, moved, figures, kept = come()
            ferry.judge(kept)
            for name, part in parts.items():
                changed[name] = self._stored(name, shapes[name[len(prefix) + 1 :]], part)
            sizes = [sum(t.nbytes for t in changed[name].values()) for name in parts]
            sizes = sizes or [0] * len(shapes)
            for name, others in moved.items():
                changed[name] |= others
            return Figures(**figures), self.way.seconds(begin, end), sizes

        self.way.do(settle, lambda told: self.on_event(account(shapes, settings, *told)))

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
