"""How long a run will take, from a short rehearsal of its most expensive layer.

A layer's time is that of its tokens, linear in their number, and that of solving, which knows none.
The rehearsal runs the layer in full on few tokens, and once more on three times as many without
solving; the difference is the price of a token. Layers that are solved otherwise are scaled by
their multiplications.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..compress.at_work import AtWork, Replay, Stack
from ..compress.calibrate import Calibration
from ..compress.capture import Ends, fill_layer, read_layer
from ..compress.ferry import Checks, Ferry
from ..compress.languages import Mixture
from ..compress.left_out import LeftOut
from ..compress.packing import Packing
from ..compress.plan import Plan, make_plan
from ..compress.proof import PROOF_WINDOWS, prove, truncated_depth
from ..compress.report import Report
from ..compress.store import Store
from ..compress.twin import Twin
from ..compress.walk import LayerWalk
from ..models.skeleton import build_skeleton
from ..recipe import Recipe

WINDOWS = 8  # of the first pass: layers of quality high are trained only with so many
LONGEST = 256  # tokens of a window
_WRITTEN = 16 << 20  # bytes written to see how fast the disk is


@dataclass(frozen=True)
class Rehearsal:
    """Seconds. solve: of a layer, tokens apart; first: of its first `tokens` tokens; per_token: of
    every further one; proof: two windows over `proof_layers` layers; embed: of a token's first
    hidden state; forward: of a token through the layer; disk: of a byte written and synced.
    """

    layer: int
    tokens: int
    solve: float
    first: float
    per_token: float
    forward: float
    proof: float
    proof_layers: int
    embed: float
    disk: float

    def of_layer(self, tokens: int, share: float = 1.0) -> float:
        """A layer with so many tokens whose solving takes `share` of the rehearsed one's."""
        return share * self.solve + max(0.0, self.first + self.per_token * (tokens - self.tokens))


class _Timed(AtWork):
    """Adds up what gathering takes; solves nothing where solved is False."""

    gathering = 0.0
    solves = True

    def _gather(self, *args: Any) -> None:
        start = time.perf_counter()
        super()._gather(*args)
        self.gathering += time.perf_counter() - start

    def _solve(self, prefix: str, layer: Any, names: list[str], *rest: Any) -> Stack:
        if self.solves:
            return super()._solve(prefix, layer, names, *rest)
        settings = self.plan[f"{prefix}.{names[0]}"]
        nothing: Any = None
        return Stack(names, settings, {}, nothing, {}, None, None, None, False)

    def _send(self, *args: Any) -> None:
        if self.solves:
            super()._send(*args)

    def _trains(self, *args: Any) -> bool:
        return self.solves and super()._trains(*args)


def rehearse(
    checkpoint: Checkpoint,
    recipe: Recipe,
    source_layers: int,
    calibration: Calibration | None,
    layer: int,
) -> dict[str, Any]:
    """Run a layer of the model, whose drop_layers are already gone, on few tokens; the fields of a
    Rehearsal.
    """
    plan = make_plan(recipe, checkpoint, source_layers)
    few = _windows(checkpoint, calibration)
    with tempfile.TemporaryDirectory(prefix="distaya-") as scratch:
        disk = _disk(Path(scratch))
    learns = any(settings.statistic is not None for settings in plan.values())
    if not learns:
        solve, _, _ = _run(checkpoint, recipe, plan, None, layer, solves=True)
        return vars(Rehearsal(layer, 0, solve, 0.0, 0.0, 0.0, 0.0, 1, 0.0, disk))
    start = time.perf_counter()
    prove(checkpoint, few.ids[:PROOF_WINDOWS], torch.device("cpu"), whole=False)
    proof = time.perf_counter() - start
    solve, first, _ = _run(checkpoint, recipe, plan, few, layer, solves=True)
    more = replace(few, ids=few.ids.repeat(3, 1), languages=few.languages * 3)
    _, third, (embed, forward) = _run(checkpoint, recipe, plan, more, layer, solves=False)
    each = max(0.0, third - first) / (2 * few.tokens)
    return vars(
        Rehearsal(
            layer, few.tokens, solve, first, each, forward / more.tokens, proof,
            truncated_depth(checkpoint.config), embed / more.tokens, disk,
        )
    )  # fmt: skip


def _windows(checkpoint: Checkpoint, calibration: Calibration | None) -> Calibration:
    """A few of the windows, or made-up ones."""
    if calibration is not None:
        ids = calibration.ids[:, :LONGEST]
        ids = ids.repeat(-(-WINDOWS // len(ids)), 1)[:WINDOWS].contiguous()
    else:
        made = torch.Generator().manual_seed(0)
        ids = torch.randint(0, checkpoint.config.vocab_size, (WINDOWS, LONGEST), generator=made)
    return Calibration(ids, ["en"] * len(ids))


def _run(
    checkpoint: Checkpoint,
    recipe: Recipe,
    plan: Plan,
    calibration: Calibration | None,
    index: int,
    *,
    solves: bool,
) -> tuple[float, float, tuple[float, float]]:
    """Seconds: of solving and the rest; of the tokens; of embedding and of one forward."""
    packing = Packing(recipe, plan, checkpoint)
    report = Report(recipe.method, checkpoint.architecture.model_type, Path())
    report.source_layers = checkpoint.source_layers
    device, architecture = torch.device("cpu"), checkpoint.architecture
    skeleton = build_skeleton(checkpoint.config, checkpoint.dtype)
    prefix = f"{architecture.layers}.{index}"
    weightless = skeleton.get_submodule(prefix)
    replay, embedding, last = None, 0.0, 0.0
    start = time.perf_counter()
    if calibration is not None:
        replay = _replay(checkpoint, skeleton, recipe, packing, calibration)
        embedding = time.perf_counter() - start
    start = time.perf_counter()
    weights = read_layer(weightless, prefix, checkpoint)
    layer, walk, twin = fill_layer(weightless, weights, device), None, None
    checks = Checks(late=False)
    if replay is not None:
        calls = [replay.calls.of(index, chunk) for chunk in range(len(replay.calls))]
        walk = LayerWalk(layer, architecture, calls, replay.hidden, replay.tape, checks)
        if replay.dense is not None:
            dense = fill_layer(weightless, weights, device)
            twin = Twin(dense, walk, architecture, calls, *replay.dense)
    with Ferry(device) as way:
        work = _Timed(packing.plan, packing, report, lambda event: None, way, checks)
        work.solves = solves
        work.compress(index, prefix, layer, architecture, replay, walk, twin)
        if walk is not None:
            began = time.perf_counter()
            walk.finish()
            last = time.perf_counter() - began
            replay.account()
    whole = time.perf_counter() - start
    tokens = work.gathering + last
    return whole - tokens, tokens, (embedding, last)


def _replay(
    checkpoint: Checkpoint,
    skeleton: Any,
    recipe: Recipe,
    packing: Packing,
    calibration: Calibration,
) -> Replay:
    mixture = Mixture(calibration, "proportional", torch.device("cpu"))
    left_out = LeftOut(calibration, Report("", "", Path()))
    replay = Replay(calibration, Store(), Store(), mixture, left_out)
    if recipe.calibration.weights == "worst" or any(s.aims for s in packing.plan.values()):
        replay.dense = (Store(), Store())
    ends = Ends(skeleton, checkpoint, torch.device("cpu"))
    replay.short = ends.inputs(calibration.ids[: replay.batch])[1]
    for chunk, ids in enumerate(calibration.chunks()):
        hidden, calls = ends.inputs(ids)
        replay.calls.add(calls)
        for store in (replay.hidden, *(replay.dense or ())[:1]):
            store.put(("hidden", chunk), hidden)
    return replay


def _disk(folder: Path) -> float:
    """Seconds per byte written and synced, at least those of 4 GiB a second."""
    start = time.perf_counter()
    with open(folder / "written", "wb") as file:
        file.write(bytes(_WRITTEN))
        file.flush()
        os.fsync(file.fileno())
    return max((time.perf_counter() - start) / _WRITTEN, 1 / (4 << 30))
