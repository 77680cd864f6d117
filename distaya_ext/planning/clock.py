"""How long a run will take, from a short rehearsal of its most expensive layer.

A layer's time is that of its tokens, linear in their number, and that of solving, which knows none.
The rehearsal runs the layer in full on few tokens, and once more on three times as many without
solving; the difference is the price of a token. Layers that are solved otherwise are scaled by
their multiplications. Of solving it is told apart what processes share otherwise than rows (see
scaling.py): reading, factorising, training, encoding.
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
from ..compress.at_work import AtWork, Stack
from ..compress.calibrate import Calibration
from ..compress.capture import Ends, fill_layer, read_layer
from ..compress.ferry import Checks, Ferry
from ..compress.languages import Mixture
from ..compress.left_out import LeftOut
from ..compress.packing import Packing
from ..compress.plan import Plan, make_plan
from ..compress.proof import PROOF_WINDOWS, prove, truncated_depth
from ..compress.replay import Replay
from ..compress.report import Report
from ..compress.store import Store
from ..compress.twin import Twin
from ..compress.walk import LayerWalk
from ..models.skeleton import build_skeleton
from ..recipe import Recipe
from .factors import factoring
from .work import Work

WINDOWS = 8  # of the first pass: layers of quality high are trained only with so many
LONGEST = 256  # tokens of a window
_WRITTEN = 16 << 20  # bytes written to see how fast the disk is


@dataclass(frozen=True)
class Rehearsal:
    """Seconds. solve: of a layer, tokens apart; first: of its first `tokens` tokens; per_token: of
    every further one; proof: two windows over `proof_layers` layers; embed: of a token's first
    hidden state; forward: of a token through the layer; disk: of a byte written and synced. Parts
    of solve: read, the layer's weights; factor and inverse, its factorisations and inverses, timed
    once more by themselves; train, on `tokens` tokens; encode, what the file holds.
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
    read: float = 0.0
    factor: float = 0.0
    inverse: float = 0.0
    train: float = 0.0
    encode: float = 0.0

    def of_layer(self, tokens: int, share: float = 1.0) -> float:
        """A layer with so many tokens whose solving takes `share` of the rehearsed one's."""
        return self.work(share).seconds(tokens)

    def work(self, share: float = 1.0) -> Work:
        """The parts of such a layer. Without a factor there are no rows to share."""
        rest = max(0.0, self.solve - self.read - self.train - self.encode)
        factor = min(self.factor, rest) if self.factor else rest
        inverse = min(self.inverse, rest - factor)
        return Work(
            read=share * self.read,
            gather=self.first - self.per_token * self.tokens,
            token=self.per_token,
            factor=share * factor,
            inverse=share * inverse,
            rows=share * (rest - factor - inverse),
            train=share * self.train / max(1, self.tokens),
            write=share * self.encode,
        )


class _Timed(AtWork):
    """Adds up what gathering takes; solves nothing where solved is False."""

    gathering = training = encoding = 0.0
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
            start = time.perf_counter()
            super()._send(*args)
            self.encoding += time.perf_counter() - start

    def _train(self, *args: Any) -> dict[str, torch.Tensor]:
        start = time.perf_counter()
        found = super()._train(*args)
        self.training += time.perf_counter() - start
        return found

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
        once = _run(checkpoint, recipe, plan, None, layer, solves=True)
        parts = {"read": once.read, "encode": once.encoding}
        return vars(Rehearsal(layer, 0, once.solve, 0.0, 0.0, 0.0, 0.0, 1, 0.0, disk, **parts))
    start = time.perf_counter()
    prove(checkpoint, few.ids[:PROOF_WINDOWS], torch.device("cpu"), whole=False)
    proof = time.perf_counter() - start
    once = _run(checkpoint, recipe, plan, few, layer, solves=True)
    more = replace(few, ids=few.ids.repeat(3, 1), languages=few.languages * 3)
    again = _run(checkpoint, recipe, plan, more, layer, solves=False)
    each = max(0.0, again.tokens - once.tokens) / (2 * few.tokens)
    return vars(
        Rehearsal(
            layer, few.tokens, once.solve, once.tokens, each, again.last / more.tokens, proof,
            truncated_depth(checkpoint.config), again.embedding / more.tokens, disk, once.read,
            *factoring(checkpoint, plan, layer), once.training, once.encoding,
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


@dataclass(frozen=True)
class _Took:
    """Seconds: solve, of which read, training and encoding are parts; tokens, of which `last` is
    the last forward; embedding.
    """

    solve: float
    tokens: float
    embedding: float
    last: float
    read: float
    training: float
    encoding: float


def _run(
    checkpoint: Checkpoint,
    recipe: Recipe,
    plan: Plan,
    calibration: Calibration | None,
    index: int,
    *,
    solves: bool,
) -> _Took:
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
    read = time.perf_counter() - start
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
    return _Took(whole - tokens, tokens, embedding, last, read, work.training, work.encoding)


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
