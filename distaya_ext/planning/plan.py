"""plan(): everything that can be known of a run before it is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint, check_companions, check_output, open_checkpoint
from ..compress import glu
from ..compress.budget import Budget, device_bytes, needs_of, waits_on_host
from ..compress.calibrate import CUDA_CHUNK_TOKENS, Calibration, load_calibration
from ..compress.capture import check_tied
from ..compress.driver import as_run
from ..compress.keep import most_bytes
from ..compress.packing import Packing
from ..compress.phases import Job, Memory, layer_kinds, memory
from ..compress.plan import make_plan
from ..compress.settings import from_recipe
from ..device import find_device
from ..errors import UsageError
from ..models.skeleton import build_skeleton
from ..recipe import Recipe
from . import probe, wire
from .clock import Rehearsal
from .fits import check_ram, check_space, nearest
from .parts import Part, Rival, parts_of, rivals
from .ranks import Rank, ranks_of
from .scaling import Scaling, check_ranks, left_out, simulate
from .times import Estimate, costs, estimate, layer_work

SCHEMA = 1


@dataclass(frozen=True)
class Plan:
    """What a run takes and gives; bytes unless it says otherwise.

    memory    host memory: peak of a fresh `distaya compress`, by phase
    vram      of a GPU: counted from shapes, not measured; None on the CPU. away: activations wait
              in the host's memory
    disk      what is written beside the output at most, by what it is
    output    of the weight files, headers included; parts: without headers
    time      None without a rehearsal
    scaling   the same run as several processes, simulated; None where none were asked for
    """

    model: str
    recipe: Mapping[str, Any]
    device: str
    tokens: int
    layers: int
    format: str
    memory: Memory
    vram: int | None
    away: bool
    disk: Mapping[str, int]
    output: int
    source: int
    parts: Mapping[str, Part]
    bits_per_weight: float
    bits_per_weight_layers: float
    ranks: list[Rank]
    rivals: list[Rival]
    time: Estimate | None
    scaling: Scaling | None = None
    notices: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "recipe": dict(self.recipe),
            "device": self.device,
            "tokens": self.tokens,
            "layers": self.layers,
            "format": self.format,
            "ram": {
                "peak": self.memory.peak,
                "decided_by": self.memory.worst,
                "process": self.memory.process,
                "phases": {k: self.memory.process + v for k, v in self.memory.phases.items()},
                "spilled": self.memory.spilled,
                "proof": "whole" if self.memory.whole_proof else "truncated",
                "shard": self.memory.shard_bytes,
            },
            "vram": None
            if self.vram is None
            else {"peak": self.vram, "kind": "counted, not measured", "away": self.away},
            "disk": {"peak": sum(self.disk.values()), **self.disk},
            "output": {
                "bytes": self.output,
                "source_bytes": self.source,
                "parts": {name: part.to_dict() for name, part in self.parts.items()},
                "bits_per_weight": self.bits_per_weight,
                "bits_per_weight_layers": self.bits_per_weight_layers,
            },
            "ranks": [rank.to_dict() for rank in self.ranks],
            "rivals": [rival.to_dict() for rival in self.rivals],
            "time": None if self.time is None else self.time.to_dict(),
            "scaling": None if self.scaling is None else self.scaling.to_dict(),
            "notices": list(self.notices),
        }


def plan(
    model: str | Path,
    recipe: Recipe,
    texts: Any = None,
    *,
    out: str | Path | None = None,
    max_ram: str | None = None,
    max_vram: str | None = None,
    device: str = "cpu",
    rehearse: bool = True,
    offline: bool = False,
    ranks: Sequence[int] = (),
    network: str | None = None,
) -> Plan:
    """What compress() of the same arguments will take; nothing is written but a temporary folder.

    model, texts, offline  as compress() takes them
    out        where the output would go, None: the current folder; its disk is looked at
    max_ram    "8GiB", in the place of the recipe's; max_vram: of a GPU's memory, in the same way
    device     "cpu" or "cuda"; for a GPU that is not here pass max_vram
    rehearse   False: no layer is run, and no time is told
    ranks      numbers of processes under torchrun to simulate the run with; network: what passes
               between them, "10GB/s" into and out of each; None: as two processes of this host do

    Raises what compress() would before its first layer, in the same words, and ResourceError (exit
    code 5) where the run does not fit into the memory or onto the disk, saying what would.
    """
    limits = {"max_ram": max_ram, "max_vram": max_vram}
    recipe = recipe.model_copy(update={k: v for k, v in limits.items() if v is not None})
    recipe = Recipe(**as_run(recipe, model, texts).model_dump(exclude_unset=True))
    place = torch.device("cuda") if _absent_gpu(device, recipe) else find_device(device)
    if out is not None and not Path(out).exists():
        check_output(Path(out), overwrite=False)
    source = open_checkpoint(model, offline=offline)
    check_companions(source.folder)
    check_tied(source, build_skeleton(source.config, source.dtype))
    alone, notices = _alone(recipe, source, texts, device, offline)
    between = wire.asked(ranks, network)
    job = _job(alone, source, texts, place)
    check_ranks(ranks, job.calibration, alone.calibration.parts)
    budget = Budget(job.checkpoint, alone.max_ram_bytes, job.needs)
    notices += [*glu.notices(alone, job.packing.plan, job.checkpoint), *job.packing.notices]
    vram, away = _device(job, alone, place)
    output = job.packing.predicted()
    folder = nearest(Path(out).parent if out is not None else Path.cwd())
    disk = _disk(job, budget, output, recipe, away or place.type == "cpu", source)
    others = rivals(alone, job.packing, source.config.num_hidden_layers, output)
    check_space(folder, sum(disk.values()), output, _smaller(alone))
    told = probe.ask(_request(source, alone, texts, offline, rehearse, job))
    found = memory(job, budget, told["process"])
    check_ram(job, found, alone.max_ram_bytes)
    time = None
    if rehearse:
        rehearsal = Rehearsal(**told["rehearsal"])
        time = estimate(job, recipe, rehearsal, told["startup"], output, source)
    scaling = None
    if ranks:
        spent = None
        if rehearse and place.type == "cpu":
            spent = costs(job, rehearsal, told["startup"], output, source)
        scaling = simulate(
            job, ranks, between or wire.measured(), spent, parts=alone.calibration.parts,
            budget=budget if place.type == "cpu" else None, process=told["process"],
            notices=left_out(recipe, place, rehearse),
        )  # fmt: skip
    parts = parts_of(job.packing)
    inner = [parts[name] for name in ("attention", "mlp") if name in parts]
    weights = sum(part.weights for part in parts.values())
    return Plan(
        model=str(model), recipe=recipe.model_dump(mode="json"), device=place.type,
        tokens=job.tokens, layers=job.checkpoint.config.num_hidden_layers,
        format=job.packing.format, memory=found, vram=vram, away=away, disk=disk, output=output,
        source=source.nbytes, parts=parts,
        bits_per_weight=8 * sum(part.bytes for part in parts.values()) / weights,
        bits_per_weight_layers=8
        * sum(part.bytes for part in inner)
        / max(1, sum(part.weights for part in inner)),
        ranks=ranks_of(job.checkpoint, job.packing.plan, job.tokens), rivals=others, time=time,
        scaling=scaling, notices=notices,
    )  # fmt: skip


def _absent_gpu(device: str, recipe: Recipe) -> bool:
    """A GPU that is planned for on another machine."""
    named = device.startswith("cuda") and recipe.max_vram is not None
    return named and not torch.cuda.is_available()


def _alone(
    recipe: Recipe, source: Checkpoint, texts: Any, device: str, offline: bool
) -> tuple[Recipe, list[str]]:
    """The step of a chain that compresses, checked as the chain would be. Of layers that are
    chosen by score as many as will go stand for them, from the end.
    """
    if not recipe.chained:
        return recipe, []
    from ..chain import ready, steps
    from ..influence.choose import how_many

    ready.check(recipe, texts)
    task = steps.Task(source, recipe, texts, lambda event: None, None, device, offline)
    ready.check_model(task)
    if isinstance(recipe.drop_layers, list):
        return recipe.alone(recipe.drop_layers), []
    depth = source.config.num_hidden_layers
    count, free = how_many(recipe.drop_layers, depth)
    told = f"which {count} of {depth} layers go is not known yet; planned without the last ones"
    return recipe.alone(sorted(free)[-count:]), [told]


def _job(recipe: Recipe, source: Checkpoint, texts: Any, place: torch.device) -> Job:
    checkpoint = source.without(recipe.drop_layers)
    plan = make_plan(recipe, checkpoint, source.config.num_hidden_layers)
    calibration: Calibration | None = None
    if from_recipe(recipe).statistic is not None:
        calibration = load_calibration(texts, recipe, source)
        if place.type == "cuda":
            calibration = replace(calibration, chunk_tokens=CUDA_CHUNK_TOKENS)
    packing = Packing(recipe, plan, checkpoint)
    needs = needs_of(recipe, plan, checkpoint)
    weights, limited = recipe.calibration.weights, recipe.max_ram is not None
    return Job(checkpoint, packing.plan, packing, needs, calibration, weights, limited)


def _device(job: Job, recipe: Recipe, place: torch.device) -> tuple[int | None, bool]:
    """Bytes of a GPU's memory, and whether activations wait on the host."""
    if place.type != "cuda":
        if recipe.max_vram is not None:
            raise UsageError("max_vram limits a GPU's memory, so it needs --device cuda")
        return None, False
    away = waits_on_host(job.checkpoint, job.tokens, place, job.needs, recipe.max_vram_bytes)
    return device_bytes(job.checkpoint, 0 if away else job.tokens, job.needs), away


def _disk(
    job: Job, budget: Budget, output: int, recipe: Recipe, here: bool, source: Checkpoint
) -> dict[str, int]:
    found = {
        "output": output,
        "kept for resuming": most_bytes(
            job.checkpoint, job.tokens, job.needs, budget.shard_bytes, output
        ),
        "spilled activations": job.waiting if here and budget.spills(job.waiting) else 0,
    }
    if recipe.heal is not None:
        from ..chain.ready import learning_bytes

        found["healed model"] = output
        found["checkpoints of healing"] = learning_bytes(recipe.heal, source)
    return found


def _smaller(recipe: Recipe) -> str | None:
    if recipe.embed_bits is None and recipe.bits is not None:
        return "an embedding in 8 bits (--embed-bits 8)"
    return "weights in 4 bits (--bits 4)" if recipe.bits is None else None


def _request(
    source: Checkpoint, recipe: Recipe, texts: Any, offline: bool, rehearse: bool, job: Job
) -> dict[str, Any]:
    worst = max(
        layer_kinds(job.checkpoint, job.plan),
        key=lambda index: layer_work(job.checkpoint, job.plan, index),
    )
    named = texts if isinstance(texts, (str, Path)) else recipe.calibration.path
    given = texts is None or isinstance(texts, (str, Path))
    return {
        "model": str(source.folder.resolve()),
        "recipe": recipe.model_dump(mode="json", exclude_unset=True),
        "texts": str(named) if given and named and job.calibration is not None else None,
        "offline": offline,
        "rehearse": rehearse,
        "layer": worst,
    }
