"""One walk through the dense model: every variant of every matrix is made and its KL measured.

At a layer the Hessians of all its stages are gathered from the dense stream in one forward of the
Hessian windows. Each is factorised once, and every choice is one sweep with that factor. Then each
matrix in turn is exchanged for each of its variants and the search windows are run from this layer
on; where they stand when they enter it is all that is kept of what lies before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from ..compress.calibrate import CHUNK_TOKENS
from ..compress.capture import Calls
from ..compress.refine import pattern, rounding
from ..compress.store import Store
from ..errors import InputError
from ..finite import all_finite
from ..formats import Grid
from ..models import Stage
from ..ops import obs as obs_op
from ..ops.cholesky import Factor, cholesky
from ..ops.hessian import Hessian
from .choices import Choice, Costs
from .whole import Whole, Windows

OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Unit:
    """Linears (full names) that are given one choice, and the choices there are for them."""

    layer: int
    names: tuple[str, ...]
    choices: tuple[Choice, ...]


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


class Variants:
    """Compressed matrices by (name, choice): codes, scales and zeros in a Store."""

    def __init__(self, store: Store, costs: Costs, whole: Whole):
        self.store, self.costs, self.whole = store, costs, whole

    def put(self, name: str, choice: Choice, grid: Grid) -> None:
        self.store.put((name, choice), (grid.codes, grid.scales, grid.zeros))

    def weight(self, name: str, choice: Choice) -> torch.Tensor:
        """The weight as the model would run it."""
        if choice.dense:
            return self.whole.model.get_submodule(name).weight.data
        codes, scales, zeros = self.store.get((name, choice))
        settings = self.costs.settings[choice]
        group = settings.group if settings.group < codes.shape[1] else 0
        grid = Grid(codes, scales, zeros, settings.bits, group)
        return grid.dense(self.whole.dtype).to(self.whole.device)


class Walk:
    """The walk: hessian windows ids [N, length] for the sweeps, windows for the measurements."""

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
        self.hessian = hessian.split(max(1, CHUNK_TOKENS // hessian.shape[1]))
        self.calls = Calls()
        self.total = sum(self._variants(layer) for layer in self.units)
        self.done = 0

    def _variants(self, layer: int) -> int:
        each = (sum(not choice.dense for choice in unit.choices) for unit in self.units[layer])
        return sum(each) + self.drop

    def go(self) -> Sensitivities:
        """All layers."""
        found = Sensitivities()
        for chunk, ids in enumerate(self.hessian):
            hidden, calls = self.whole.inputs(ids.to(self.whole.device))
            self.streams.put(chunk, hidden)
            self.calls.add(calls)
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

    def _layer(self, layer: int, found: Sensitivities) -> None:
        start = time.perf_counter()
        moments = self._gather(layer)
        start = self.seconds.since("gather", start)
        for stage, moment in moments.items():
            self._solve(layer, stage, moment)
        start = self.seconds.since("solve", start)
        self._measure(layer, found)
        self.seconds.since("measure", start)

    def _gather(self, layer: int) -> dict[Stage, Hessian]:
        """Second moments of the inputs of all stages of a dense layer; the stream moves on."""
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
        try:
            with torch.no_grad():
                for chunk in range(len(self.calls)):
                    call = self.calls.of(layer, chunk)
                    self.streams.put(chunk, call.run(module, self.streams.get(chunk)))
        finally:
            for hook in hooks:
                hook.remove()
        return moments

    def _solve(self, layer: int, stage: Stage, moment: Hessian) -> None:
        """Every variant of a stage's matrices, with one factorisation."""
        prefix = f"{self.whole.prefix}.{layer}"
        names = [f"{prefix}.{name}" for name in stage.names]
        factor = cholesky(moment.finish(), self.costs.common.get("damp", 0.01), overwrite=True)
        for choice in self.costs.choices:
            able = [name for name in names if self.costs.fits(name, choice)]
            if choice.dense or not able:
                continue
            # Rows of a sweep do not know of each other but for an unstructured mask's threshold.
            stacks = [[name] for name in able] if choice.sparsity is not None else [able]
            for stack in stacks:
                self._sweep(stack, choice, factor)

    def _sweep(self, names: list[str], choice: Choice, factor: Factor) -> None:
        settings = self.costs.settings[choice]
        weights = [self.whole.model.get_submodule(name).weight.data for name in names]
        result = obs_op.obs(
            torch.cat(weights), factor=factor, **pattern(settings), **rounding(settings)
        )
        if not all_finite(result.scales):
            raise InputError(
                f"the {choice.name} variant of {names[0]} is not finite; give more texts"
            )
        zeros = None if settings.symmetric else result.zeros.to(torch.uint8)
        group = settings.group if settings.group < result.W.shape[1] else 0
        whole = Grid(
            result.codes, result.scales.to(settings.scale_dtype), zeros, settings.bits, group
        )
        row = 0
        for name, W in zip(names, weights, strict=True):
            self.variants.put(name, choice, whole.part(row, row + len(W)))
            row += len(W)

    def _measure(self, layer: int, found: Sensitivities) -> None:
        """Every variant of a layer on every chunk; then the search windows move on."""
        windows, units = self.windows, self.units[layer]
        kl = {unit: np.zeros((len(unit.choices), windows.count)) for unit in units}
        dropped = np.zeros(windows.count)
        for chunk in range(windows.chunks):
            here = windows.store.get(("here", chunk))
            reference = windows.reference(chunk)
            place = slice(chunk * windows.chunk, (chunk + 1) * windows.chunk)
            for unit in units:
                for index, choice in enumerate(unit.choices):
                    if choice.dense:  # costs nothing
                        continue
                    weights = {name: self.variants.weight(name, choice) for name in unit.names}
                    with self.whole.exchanged(weights):
                        last = windows.run(here, chunk, layer)
                    kl[unit][index, place] = reference.divergence(last)
                    self._step(chunk, f"layer {layer + 1}")
            if self.drop:
                dropped[place] = reference.divergence(windows.run(here, chunk, layer + 1))
                self._step(chunk, f"layer {layer + 1}")
            windows.store.put(("here", chunk), windows.run(here, chunk, layer, layer + 1))
        ends = 0.0 if found.ends is None else found.ends
        for unit in units:
            each = np.stack([by_language(windows, row) for row in kl[unit]])
            dense = np.array([choice.dense for choice in unit.choices])
            found.kl[unit] = np.where(dense[:, None], 0.0, np.maximum(each - ends, 0.0))
        if self.drop:
            found.dropped[layer] = np.maximum(by_language(windows, dropped) - ends, 0.0)
        variants = self._variants(layer)
        rest = len(self.whole.layers) - layer
        self.seconds.forwards += (variants * rest + 1) * windows.tokens

    def _step(self, chunk: int, what: str) -> None:
        if chunk == self.windows.chunks - 1:
            self.done += 1
            self.on_progress(self.done, self.total, what)


def measure(
    windows: Windows,
    weights: dict[int, Callable[[], dict[str, torch.Tensor]]],
    skip: frozenset[int],
) -> np.ndarray:
    """Mean KL(dense || model) per window, the model being the dense one without the layers in skip
    and with what weights[layer]() gives (by full name) in the place of its Linears.

    One layer's weights are in memory at a time beside the dense model's.
    """
    whole, store = windows.whole, windows.store
    for chunk in range(windows.chunks):
        store.put(("run", chunk), store.get(("first", chunk)))
    for layer in range(len(whole.layers)):
        if layer in skip:
            continue
        with whole.exchanged(weights[layer]() if layer in weights else {}):
            for chunk in range(windows.chunks):
                hidden = windows.run(store.get(("run", chunk)), chunk, layer, layer + 1)
                store.put(("run", chunk), hidden)
    found = []
    for chunk in range(windows.chunks):
        found.append(windows.reference(chunk).divergence(store.get(("run", chunk))))
        store.drop(("run", chunk))
    return np.concatenate(found)


def by_language(windows: Windows, per_window: np.ndarray) -> np.ndarray:
    """Means per language, float64 [languages]."""
    sums = np.bincount(windows.of_window, weights=per_window, minlength=len(windows.languages))
    return sums / np.bincount(windows.of_window, minlength=len(windows.languages))
