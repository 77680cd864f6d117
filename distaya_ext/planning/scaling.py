"""What a run takes as N processes: bytes between them, seconds by part, memory of each.

Nothing of it is measured. Shared among N ranks are the calibration tokens (the forward and what is
gathered of it, training) and the rows (sweeps, refits). Not shared: every rank factorises every
Hessian itself, all ranks together read each byte of a layer once, rank 0 alone writes. On the CPU
these parts are taken to follow each other, since no core is left for the thread that writes; on a
GPU the next layer is read, and the last one written, beside the work. Bytes are counted from shapes
(passed.py) and pass at one rate; what a message costs however small it is is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..compress.budget import Budget, device_bytes
from ..compress.calibrate import Calibration
from ..compress.phases import Job, layer_kinds, memory
from ..compress.shared import check_parts
from ..errors import UsageError
from ..ranks import sums
from ..recipe import Recipe
from .factors import LEVELS, rounds
from .passed import KINDS, in_parts, of_layer, outside, windows_of, with_windows
from .traffic import Traffic
from .wire import Wire
from .work import Work

KIND = "simulated by the cost model, not measured"
SHARED = {
    "gather": "every token runs through the layer once, on one of the ranks",
    "rows": "every rank sweeps its own rows",
    "train": "every rank trains on its own windows",
    "inverse": "every rank inverts for its share of the levels of ADMM, and passes that on",
}
ALONE = {
    "read": "all ranks read the same layer from one disk and pass it on",
    "reduce": "the sums of every rank go through the wire, however many ranks there are",
    "factor": "every rank factorises each Hessian itself, and solves alone what has none",
    "spread": "every rank needs all compressed rows",
    "gradients": "in every step the gradients of every rank go through the wire",
    "write": "rank 0 encodes and writes alone",
    "outside": "start, proof, embedding and head are hardly shared",
}
PARTS = (
    "read", "gather", "reduce", "factor", "inverse", "rows", "spread", "train", "gradients", "write"
)  # fmt: skip
_OVER = {
    "weights": "read", "moments": "reduce", "inverses": "inverse", "rows": "spread",
    "gradients": "gradients",
}  # fmt: skip
_BUFFERS = 4  # of a piece that is summed: given, come, the sum, and the sum of all


@dataclass(frozen=True)
class Costs:
    """Seconds. works: of a layer of every kind, see phases.layer_kinds; alone: outside of the
    layers and not shared; shared: outside and shared by windows. late: of GPUs, so reading and
    writing go on beside the work of a layer; weights: bytes a second between the hosts' memories,
    through which ranks pass on what they read (None: as everything else).
    """

    works: Mapping[int, Work]
    alone: float = 0.0
    shared: float = 0.0
    late: bool = False
    weights: float | None = None

    def passing(self, kind: str, traffic: Traffic, rate: float) -> float:
        """Seconds. gloo sends broadcasts along a tree, NCCL along a ring in small pieces."""
        nccl = self.late and kind != "weights"
        hops = 1 if nccl else max(1, (len(traffic.told) - 1).bit_length())
        return traffic.seconds((kind == "weights" and self.weights) or rate, hops)


@dataclass(frozen=True)
class AtRanks:
    """A run as `ranks` processes. bytes: kind -> (sent, received) of the rank with most, for a
    layer in the mean; sent, read: of the whole run. parts: seconds of a layer by part, in the mean.
    seconds: of all layers and what is outside; None where nothing was rehearsed.
    """

    ranks: int
    windows: int
    bytes: dict[str, tuple[int, int]]
    sent: int
    read: int
    memory: int
    parts: dict[str, float] | None = None
    layer: float | None = None
    outside: float | None = None
    seconds: float | None = None
    efficiency: float | None = None

    def to_dict(self) -> dict[str, Any]:
        told = {k: {"sent": sent, "received": come} for k, (sent, come) in self.bytes.items()}
        return {**vars(self), "bytes": told}


@dataclass(frozen=True)
class Scaling:
    """One row for every number of ranks; sentence: where it stops, None without seconds."""

    wire: Wire
    rows: list[AtRanks]
    sentence: str | None = None
    notices: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": KIND,
            "wire": self.wire.to_dict(),
            "rows": [row.to_dict() for row in self.rows],
            "sentence": self.sentence,
            "notices": self.notices,
        }


def check_ranks(worlds: Sequence[int], calibration: Calibration | None, parts: int | None) -> None:
    """UsageError for numbers of ranks that compress would refuse, in its words. calibration None:
    there are no windows to share; parts: of the recipe.
    """
    for world in worlds:
        if world < 1:
            raise UsageError(f"a run has at least 1 rank, not {world}")
        if calibration is not None:
            check_parts(parts or world, calibration, parts)


def left_out(recipe: Recipe, place: torch.device, rehearse: bool) -> list[str]:
    """What a simulation does not tell of the recipe's run, a sentence each."""
    found = []
    if rehearse and place.type != "cpu":
        found.append("the rehearsal ran on the processor, so no seconds of GPUs are told")
    others = {
        "drop_layers": not isinstance(recipe.drop_layers, list),
        "heal": recipe.heal is not None,
        "evaluate": recipe.evaluate is not None,
    }
    if any(others.values()):
        names = ", ".join(name for name, there in others.items() if there)
        found.append(f"of the compression alone: {names} of the recipe not counted")
    return found


def simulate(
    job: Job,
    worlds: Sequence[int],
    wire: Wire,
    costs: Costs | None,
    *,
    parts: int | None = None,
    budget: Budget | None = None,
    process: int = 0,
    notices: Sequence[str] = (),
) -> Scaling:
    """Of the run `job` as each number of processes; costs None: bytes and memory alone.

    parts: of the windows, None: one for each rank. budget, process: as phases.memory takes them;
    budget None: memory of a GPU, counted. UsageError for more ranks than windows.
    """
    check_ranks(worlds, job.calibration, parts)
    base = None if costs is None else _row(job, 1, wire, costs, parts, budget, process)
    rows = [_row(job, world, wire, costs, parts, budget, process, base) for world in worlds]
    sentence = None if base is None else _sentence(rows, base)
    return Scaling(wire, rows, sentence, list(notices))


def _row(
    job: Job,
    world: int,
    wire: Wire,
    costs: Costs | None,
    count: int | None,
    budget: Budget | None,
    process: int,
    base: AtRanks | None = None,
) -> AtRanks:
    job, parts = in_parts(job, world, count)
    windows = max(windows_of(job, parts))
    kinds = layer_kinds(job.checkpoint, job.plan)
    passed = {index: of_layer(job, index, parts) for index in kinds}
    depth = sum(kinds.values())
    total = dict.fromkeys(KINDS, Traffic.none(world))
    for index, times in kinds.items():
        for kind in KINDS:
            total[kind] += passed[index][kind] * times
    ends = outside(job, world)
    every = sum((*total.values(), *ends.values()), Traffic.none(world))
    sizes = {k: (max(t.given) // depth, max(t.arrived) // depth) for k, t in total.items()}
    whole = total["weights"] + ends.get("weights", Traffic.none(world))
    read = max(whole.told) if world > 1 else job.checkpoint.nbytes
    held = _memory(job, parts, windows, budget, process)
    found = AtRanks(world, windows, sizes, max(every.given), read, held)
    if costs is None:
        return found
    tokens = 0 if job.calibration is None else windows * job.calibration.ids.shape[1]
    spent, layers = dict.fromkeys(PARTS, 0.0), 0.0
    for index, times in kinds.items():
        one = _parts(costs, costs.works[index], passed[index], wire, world, tokens)
        layers += times * _layer(one, costs.late)
        for part in PARTS:
            spent[part] += times * one[part] / depth
    share = windows / max(1, len(job.calibration.ids)) if job.calibration is not None else 1.0
    beside = costs.alone + costs.shared * share
    beside += sum(costs.passing(kind, ends[kind], wire.rate) for kind in ends)
    seconds = layers + beside
    first = seconds if base is None else base.seconds
    more = {"parts": spent, "layer": layers / depth, "outside": beside, "seconds": seconds}
    return AtRanks(**{**vars(found), **more, "efficiency": first / (world * seconds)})


def _parts(
    costs: Costs, work: Work, passed: Mapping[str, Traffic], wire: Wire, world: int, tokens: int
) -> dict[str, float]:
    """Seconds of a layer by part. tokens: of the rank that has most."""
    found = {
        "read": work.read,
        "gather": work.of_tokens(tokens),
        "factor": work.factor,
        "inverse": work.inverse * rounds(world) / LEVELS,
        "rows": work.rows / world,
        "train": work.train * tokens,
        "write": work.write,
    }
    for kind, part in _OVER.items():
        found[part] = found.get(part, 0.0) + costs.passing(kind, passed[kind], wire.rate)
    return found


def _layer(parts: Mapping[str, float], late: bool) -> float:
    """Of the parts of a layer; late: what goes on beside the work costs only what exceeds it."""
    beside = [parts["read"], parts["write"]]
    work = sum(parts.values()) - sum(beside)
    return max(work, *beside) if late else work + sum(beside)


def _memory(job: Job, parts: Any, windows: int, budget: Budget | None, process: int) -> int:
    """Of the rank with most windows, at most: a stage is counted as if it were solved whole. Sums
    of further parts wait beside the one at work, and a piece of each is under way.
    """
    world = len(parts.of_rank)
    few = with_windows(job, windows)
    if budget is None:
        found = device_bytes(job.checkpoint, few.tokens, job.needs)
    else:
        found = memory(few, budget, process).peak
    if world == 1 and parts.count == 1:
        return found
    columns = max(
        (job.checkpoint.entries[f"{name}.weight"].shape[1] for name in job.plan), default=0
    )
    square = 4 * columns * columns
    waiting = max(len(own) for own in parts.of_rank).bit_length() - 1
    pieces = _BUFFERS * min(4 * sums.PIECE, square) if world > 1 else 0
    return found + waiting * square * (1 + job.needs.twin) + pieces


def _sentence(rows: Sequence[AtRanks], base: AtRanks) -> str:
    """Where it stops scaling, at the largest number of ranks."""
    most = max(rows, key=lambda row: row.ranks)
    depth = (most.seconds - most.outside) / most.layer if most.layer else 0
    spent = {part: depth * seconds for part, seconds in most.parts.items()}
    spent["outside"] = most.outside
    why = SHARED | ALONE
    worst = max(spent, key=spent.__getitem__)
    alone = {part: spent[part] for part in ALONE}
    floor, last = sum(alone.values()), max(alone, key=alone.__getitem__)
    told = (
        f"simulated: {most.ranks} ranks take {most.seconds:.3g} s where one takes "
        f"{base.seconds:.3g} s, {100 * most.efficiency:.0f} % of perfect; most of it is {worst} "
        f"({100 * spent[worst] / most.seconds:.0f} %): {why[worst]}"
    )
    if worst in SHARED:
        return (
            f"{told}; of what more ranks do not shorten ({floor:.3g} s) most is {last} "
            f"({alone[last]:.3g} s): {why[last]}"
        )
    if worst == "outside":
        last = max(most.parts, key=most.parts.__getitem__)
        return f"{told}; in a layer it is {last}: {why[last]}"
    return told
