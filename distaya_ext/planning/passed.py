"""What the ranks of a run pass to each other for one layer: by shapes, settings and windows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..compress.calibrate import Calibration
from ..compress.phases import Job
from ..compress.plan import groups
from ..compress.reconstruct import EPOCHS, HELD_OUT, Course
from ..compress.replay import Replay
from ..compress.rows import UNIT
from ..compress.settings import Settings
from ..formats.grid import groups as groups_of
from ..models import Stage
from ..ops.order import COUPLED
from ..ranks import Parts, Team
from .factors import factorisations
from .traffic import Traffic, read_shared, spread, summed

KINDS = ("weights", "moments", "inverses", "rows", "gradients")
_FIGURES = 3 * 8  # of a row: loss, energy, zeros
_COUNTS = 8 * (2048 + 1024 + 1024)  # bytes of the tables that find one threshold
_BLOCK = 128  # columns that a sweep chooses among at once
_PROJECTED = 31 * 4 * 8 * 257  # of ADMM: projections, tables, bytes of a table


def in_parts(job: Job, world: int, count: int | None) -> tuple[Job, Parts]:
    """The same with its windows in parts, dealt out among so many ranks; count: of parts, None: one
    for each rank.
    """
    parts = Parts.dealt(count or world, Team(0, world))
    if job.calibration is None:
        return job, parts
    return replace(job, calibration=replace(job.calibration, parts=parts)), parts


def windows_of(job: Job, parts: Parts) -> list[int]:
    """How many windows each rank runs."""
    if job.calibration is None:
        return [0] * len(parts.of_rank)
    each = [sum(s.stop - s.start for s in part) for part in job.calibration.of_every_part()]
    return [sum(each[part] for part in own) for own in parts.of_rank]


def of_layer(job: Job, index: int, parts: Parts) -> dict[str, Traffic]:
    """Bytes that ranks pass on for a layer, by KINDS. Rows are shared where there is a Hessian."""
    world, prefix = len(parts.of_rank), f"{job.checkpoint.architecture.layers}.{index}"
    found = dict.fromkeys(KINDS, Traffic.none(world))
    entries = job.checkpoint.entries
    own = [entries[name] for name in entries if name.startswith(f"{prefix}.")]
    found["weights"] = read_shared([(e.shape, e.dtype.itemsize) for e in own], world)
    for stage in job.checkpoint.architecture.stages:
        stacks = groups(job.plan, prefix, stage.names)
        if stacks and job.calibration is not None:
            first = job.plan[f"{prefix}.{stacks[0][0]}"]
            found["moments"] += _moments(job, prefix, stage, first, parts)
        for names in stacks:
            settings = job.plan[f"{prefix}.{names[0]}"]
            rows, columns = shape_of(job, prefix, names)
            if settings.statistic == "hessian":
                found["rows"] += spread(rows, row_bytes(job, settings, columns), world, UNIT)
                found["rows"] += _chosen(settings, columns, world)
                found["inverses"] += _inverses(settings, columns, world)
            if job.calibration is not None:
                found["gradients"] += _gradients(job, prefix, names, settings, parts)
    return found


def shape_of(job: Job, prefix: str, names: list[str]) -> tuple[int, int]:
    """Rows and columns of a stack."""
    shapes = [job.checkpoint.entries[f"{prefix}.{name}.weight"].shape for name in names]
    return sum(shape[0] for shape in shapes), shapes[0][1]


def _moments(job: Job, prefix: str, stage: Stage, settings: Settings, parts: Parts) -> Traffic:
    """What is summed while a stage is gathered: its statistic, what it aims at, and the squares of
    the inputs by language.
    """
    rows, columns = shape_of(job, prefix, [stage.names[0]])
    languages = len(set(job.calibration.languages))
    found = summed(languages, columns, parts, itemsize=8)
    if settings.statistic != "hessian":
        return found + summed(1, columns, parts)
    found += summed(columns, columns, parts, upper=True)
    if settings.aims:
        found += summed(rows if ends_block(job, stage) else columns, columns, parts)
    return found


def ends_block(job: Job, stage: Stage) -> bool:
    """Whether the stage aims at outputs; see walk.LayerWalk.block_ended_by."""
    architecture = job.checkpoint.architecture
    last = []
    for block in architecture.blocks:
        inside = [name for name in architecture.linears() if name.startswith(f"{block}.")]
        last += inside[-1:]
    return len(stage.names) == 1 and stage.names[0] in last


def row_bytes(job: Job, settings: Settings, columns: int) -> int:
    """Of a compressed row on its way to the other ranks: weights, codes with their grid, the mask
    for training, and what it cost.
    """
    found = columns * job.checkpoint.dtype.itemsize + _FIGURES
    if settings.bits is not None and not _scattered(settings):
        found += columns + 2 * 4 * _groups(settings, columns)  # scales and zeros in fp32
    if settings.pattern is not None and settings.quality == "high":
        found += columns
    if settings.order in COUPLED and settings.quality != "plain":
        found += 4 * columns  # what is aimed at
    return found


def _chosen(settings: Settings, columns: int, world: int) -> Traffic:
    """Tables of counts, where so many weights of the whole matrix go: csrc/obs/obs.h for a sweep,
    csrc/mask/mask.h for each projection of ADMM.
    """
    if world == 1 or settings.sparsity is None:
        return Traffic.none(world)
    one = -(-columns // _BLOCK) * _COUNTS
    zeros, told = (0,) * world, _PROJECTED if settings.quality == "high" else one
    return Traffic(zeros, zeros, (told,) * world)


def _inverses(settings: Settings, columns: int, world: int) -> Traffic:
    """Of ADMM, whole: every rank passes on what it has made; see rows.Rows."""
    count = factorisations(settings)[1] if world > 1 else 0
    own = [len(range(rank, count, world)) for rank in range(world)]
    zeros = (0,) * world
    return Traffic(zeros, zeros, tuple(4 * columns * columns * n for n in own))


def _groups(settings: Settings, columns: int) -> int:
    return groups_of(columns, settings.group if settings.group < columns else 0)


def _scattered(settings: Settings) -> bool:
    """Groups of columns that are no neighbours have no grid."""
    return settings.order != "natural" and settings.group > 0 and not settings.static


def outside(job: Job, world: int) -> dict[str, Traffic]:
    """What is passed on before the layers: embedding, norm and head, and the windows."""
    if world == 1 or job.calibration is None:
        return {}
    architecture, entries = job.checkpoint.architecture, job.checkpoint.entries
    ends = [architecture.embed, architecture.norm]
    ends += [] if job.checkpoint.tied else [architecture.head]
    shapes = [
        (entry.shape, entry.dtype.itemsize)
        for end in ends
        for name, entry in entries.items()
        if name.startswith(f"{end}.")
    ]
    zeros = (0,) * world
    ids = Traffic(zeros, zeros, (job.calibration.ids.nbytes, *zeros[1:]))
    return {"weights": read_shared(shapes, world), "windows": ids}


def _gradients(
    job: Job, prefix: str, names: list[str], settings: Settings, parts: Parts
) -> Traffic:
    found = Traffic.none(len(parts.of_rank))
    for name in names:
        shape = shape_of(job, prefix, [name])
        if count := learned(settings, *shape):
            found += summed(1, count, parts)
    return found * steps(job.calibration)


def learned(settings: Settings, rows: int, columns: int) -> int:
    """Numbers that quality high trains: weights, or the scales of those that are rounded."""
    if settings.quality != "high":
        return 0
    if settings.bits is None:
        return rows * columns
    return 0 if _scattered(settings) else rows * _groups(settings, columns)


def steps(calibration: Calibration) -> int:
    """Steps of training a layer: every step takes a batch of each part."""
    nothing: Any = None
    replay = Replay(calibration, nothing, nothing, nothing, nothing)
    course = Course(nothing, replay.batch, nothing, nothing, calibration, nothing)
    if course.total < HELD_OUT or not all(course.steps(held) for held in (True, False)):
        return 0
    return EPOCHS * course.steps(False)


def with_windows(job: Job, windows: int) -> Job:
    """The same with so many of the windows, in one part, as a rank has them."""
    if job.calibration is None:
        return job
    ids, languages = job.calibration.ids[:windows].clone(), job.calibration.languages[:windows]
    few = replace(job.calibration, ids=ids, languages=languages, parts=Parts())
    return replace(job, calibration=few)
