"""One walk through the dense model: every variant of every matrix is made and its KL measured.

At a layer the Hessians of all its stages are gathered from the dense stream in one forward of the
Hessian windows. Each is factorised once, and every choice is one sweep with that factor. Then each
matrix in turn is exchanged for each of its variants and the search windows are run from this layer
on; where they stand when they enter it is all that is kept of what lies before.

Under ranks the Hessian windows are dealt out and their sums added; a Hessian is factorised by one
rank; and measurements are dealt out with the sweeps that they need (deal.Dealt).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from ..compress.calibrate import CHUNK_TOKENS
from ..compress.capture import Calls
from ..compress.store import Store
from ..models import Stage
from ..ops.hessian import Hessian
from ..ranks import Parts, PartSums, Sum, Team, team
from .choices import Choice, Costs
from .deal import Dealt
from .variants import Variants, factors
from .whole import Whole, Windows, by_language, measure

OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Unit:
    """Linears (full names) that are given one choice, and the choices there are for them."""

    layer: int
    names: tuple[str, ...]
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Measured:
    """A unit with one of its choices, and the stage whose Hessian its matrices share."""

    unit: Unit
    choice: Choice
    stage: Stage

    @property
    def names(self) -> tuple[str, ...]:
        return self.unit.names


@dataclass
class Seconds:
    """Where the time of a search went."""

    gather: float = 0.0
    solve: float = 0.0
    measure: float = 0.0
    allocate: float = 0.0
    verify: float = 0.0
    polish: float = 0.0
    forwards: int = 0  # of one token through one layer

    def since(self, what: str, start: float) -> float:
        """Add the time since start to a field; returns now."""
        now = time.perf_counter()
        setattr(self, what, getattr(self, what) + now - start)
        return now


@dataclass
class Sensitivities:
    """KL per language of every choice of every unit alone, and of every layer left out.

    kl[unit]: float64 [choices, languages]; dropped[layer]: [languages].
    """

    kl: dict[Unit, np.ndarray] = field(default_factory=dict)
    dropped: dict[int, np.ndarray] = field(default_factory=dict)
    ends: np.ndarray | None = None  # what rounding embedding and head costs by itself


class Walk:
    """The walk: hessian windows ids [N, length] for the sweeps, in parts that are summed one by one
    (see ranks.sums), windows for the measurements.
    """

    def __init__(
        self,
        whole: Whole,
        costs: Costs,
        units: list[Unit],
        hessian: torch.Tensor,
        windows: Windows,
        variants: Variants,
        streams: Store,
        *,
        parts: Parts,
        drop: bool,
        seconds: Seconds,
        on_progress: OnProgress,
    ):
        self.whole, self.costs, self.windows, self.variants = whole, costs, windows, variants
        self.streams, self.drop, self.seconds, self.on_progress = (
            streams,
            drop,
            seconds,
            on_progress,
        )
        self.units = {
            layer: [unit for unit in units if unit.layer == layer]
            for layer in range(len(whole.layers))
        }
        self.hessian, self.parts, self.team = hessian, parts, team()
        self.chunks: list[range] = []  # of each part that this rank runs
        self.calls = Calls()
        self.total = sum(len(self._work(layer)) + self.drop for layer in self.units)
        self.done = self.told = 0

    def go(self) -> Sensitivities:
        """All layers."""
        found = Sensitivities()
        self._begin()
        for chunk in range(self.windows.chunks):
            self.windows.store.put(("here", chunk), self.windows.store.get(("first", chunk)))
        if self.whole.rounded:
            found.ends = by_language(self.windows, measure(self.windows, {}, frozenset()))
        for layer in self.units:
            self._layer(layer, found)
        for chunk in range(self.windows.chunks):
            self.windows.store.drop(("here", chunk))
        self.streams.clear()
        return found

    def _begin(self) -> None:
        """The first hidden states of this rank's parts; no chunk crosses a part."""
        each = max(1, CHUNK_TOKENS // self.hessian.shape[1])
        spans = Team(world=self.parts.count).shares(len(self.hessian))
        for part in self.parts.own:
            start = len(self.calls)
            for ids in self.hessian[spans[part]].split(each):
                if len(ids):  # there may be more parts than windows
                    hidden, calls = self.whole.inputs(ids.to(self.whole.device))
                    self.streams.put(len(self.calls), hidden)
                    self.calls.add(calls)
            self.chunks.append(range(start, len(self.calls)))

    def _layer(self, layer: int, found: Sensitivities) -> None:
        start = time.perf_counter()
        moments = self._gather(layer)
        start = self.seconds.since("gather", start)
        work = self._work(layer)
        dealt = self.windows.deal(len(work) + self.drop)
        self._solve(work, dealt, moments)
        start = self.seconds.since("solve", start)
        self._measure(layer, work, dealt, found)
        self.seconds.since("measure", start)

    def _work(self, layer: int) -> list[Measured]:
        """What is measured in a layer. Neighbours have one choice, so that a rank has few stacks to
        sweep and every rank about as many large matrices.
        """
        stages = {name: s for s in self.whole.architecture.stages for name in s.names}
        prefix = f"{self.whole.prefix}.{layer}."
        return [
            Measured(unit, choice, stages[unit.names[0].removeprefix(prefix)])
            for choice in self.costs.choices
            for unit in self.units[layer]
            if choice in unit.choices and not choice.dense
        ]

    def _gather(self, layer: int) -> dict[Stage, torch.Tensor]:
        """Second moments of the inputs of all stages of a dense layer, fp32 [C, C], as the upper
        triangles of sums over all tokens; the stream moves on.
        """
        module = self.whole.layers[layer]
        moments: dict[Stage, Hessian] = {}
        hooks = []
        for stage in self.whole.architecture.stages:
            first = module.get_submodule(stage.names[0])
            moment = Hessian(first.in_features, self.whole.device)
            moments[stage] = moment

            def see(_: torch.nn.Module, args: tuple, to: Hessian = moment) -> None:
                to.add(args[0])

            hooks.append(first.register_forward_pre_hook(see))
        sums = PartSums(self.parts, [Sum(moment.H, upper=True) for moment in moments.values()])
        try:
            with torch.no_grad():
                for chunks in self.chunks:
                    for chunk in chunks:
                        call = self.calls.of(layer, chunk)
                        self.streams.put(chunk, call.run(module, self.streams.get(chunk)))
                    sums.close()
        finally:
            for hook in hooks:
                hook.remove()
        sums.finish()
        return {stage: moment.H for stage, moment in moments.items()}

    def _solve(
        self, work: list[Measured], dealt: Dealt, moments: dict[Stage, torch.Tensor]
    ) -> None:
        """The variants that this rank measures. It also keeps those whose first chunk is its own.

        A measurement runs all windows through all layers behind, 2 tokens x parameters each; a
        sweep is rows x columns^2, a hundredth of that. So measurements are dealt out evenly, and a
        sweep is done where its variants are measured: on two ranks where they share one.
        """
        for number, one in enumerate(work):
            for name in one.names:
                self.variants.owner[name, one.choice] = dealt.rank_of(number)
        damp = self.costs.common.get("damp", 0.01)
        found = factors(moments, self.hessian.numel(), damp)
        stacks: dict[tuple[Stage, Choice], list[str]] = {}
        for number in dealt.needs(self.team.rank):
            if number < len(work):
                one = work[number]
                stacks.setdefault((one.stage, one.choice), []).extend(one.names)
        for (stage, choice), names in stacks.items():
            self.variants.sweep(names, choice, found[stage])

    def _measure(
        self, layer: int, work: list[Measured], dealt: Dealt, found: Sensitivities
    ) -> None:
        """Every variant of a layer on every chunk; then the search windows move on."""
        windows = self.windows
        table = np.zeros((dealt.variants, windows.count))
        mine = [dealt.of_rank(self.team.rank, chunk) for chunk in range(windows.chunks)]
        done, own = 0, sum(map(len, mine))
        for chunk, numbers in enumerate(mine):
            if not numbers:
                continue
            here, reference = windows.store.get(("here", chunk)), windows.reference(chunk)
            for number in numbers:
                last = self._last(layer, work[number : number + 1], here, chunk)
                table[number, windows.place(chunk)] = reference.divergence(last)
                done += 1
                self._tell(layer, dealt.variants * done // own)
        windows.send("here", "here", layer, layer + 1)
        self._note(layer, work, dealt.gathered(table), found)
        self._tell(layer, dealt.variants)
        self.done += dealt.variants
        rest = len(self.whole.layers) - layer
        self.seconds.forwards += (dealt.variants * rest + 1) * windows.tokens

    def _last(
        self, layer: int, one: list[Measured], here: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        """Last hidden states with a variant in the layer; without the layer for none."""
        if not one:
            return self.windows.run(here, chunk, layer + 1)
        weights = {name: self.variants.weight(name, one[0].choice) for name in one[0].names}
        with self.whole.exchanged(weights):
            return self.windows.run(here, chunk, layer)

    def _note(
        self, layer: int, work: list[Measured], table: np.ndarray, found: Sensitivities
    ) -> None:
        """The KLs of a layer, from those of its windows; what is dense costs nothing."""
        ends = 0.0 if found.ends is None else found.ends
        each = [np.maximum(by_language(self.windows, row) - ends, 0.0) for row in table]
        for unit in self.units[layer]:
            kl = np.zeros((len(unit.choices), len(self.windows.languages)))
            for one, row in zip(work, each, strict=False):
                if one.unit == unit:
                    kl[unit.choices.index(one.choice)] = row
            found.kl[unit] = kl
        if self.drop:
            found.dropped[layer] = each[-1]

    def _tell(self, layer: int, done: int) -> None:
        """So many of the layer's measurements are done; each is told of once."""
        done += self.done
        if done > self.told:
            self.told = done
            self.on_progress(done, self.total, f"layer {layer + 1}")
