"""Whether a run fits, and what would where it does not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..compress.budget import GIB, Budget, physical_bytes
from ..compress.phases import Job, Memory, memory
from ..errors import DistayaError, ResourceError

_STEP = 64 << 20  # limits that are proposed are multiples of this
_TRIES = 12


def check_ram(job: Job, found: Memory, limit: int | None) -> None:
    """ResourceError, with what would fit, when a run takes more than max_ram or the machine has."""
    there = physical_bytes() if limit is None else min(limit, physical_bytes())
    if found.peak <= there:
        return
    what = "max_ram allows" if limit is not None and there == limit else "this machine has"
    raise ResourceError(
        f"the run takes {found.peak / GIB:.2f} GiB of memory at its peak ({found.worst}) and "
        f"{what} {there / GIB:.2f} GiB; {_what_fits(job, found, there)}"
    )


def _what_fits(job: Job, found: Memory, there: int) -> str:
    ways = []
    least = least_limit(job, found.process)
    if least is not None:
        spills = memory(job, Budget(job.checkpoint, least, job.needs), found.process).spilled
        how = " with activations on the disk" if spills else ""
        ways.append(f"--max-ram {_round_up(least)}GiB is the least that suffices{how}")
    tokens = most_tokens(job, found.process, there)
    if tokens:
        ways.append(f"with that memory {tokens} calibration tokens fit instead of {job.tokens}")
    if not ways:
        ways.append("no limit and no number of tokens makes this model fit")
    return "; ".join(ways)


def _round_up(size: int) -> str:
    """GiB in two digits, not less."""
    return f"{-(-size * 100 // GIB) / 100:.2f}"


def least_limit(job: Job, process: int) -> int | None:
    """The smallest max_ram under which the predicted peak stays below it, in steps of 64 MiB; None
    where there is none.
    """
    limit = _STEP
    for _ in range(_TRIES):
        try:
            peak = memory(job, Budget(job.checkpoint, limit, job.needs), process).peak
        except DistayaError:  # below what compress itself asks for
            limit = 2 * limit if limit < GIB else limit + GIB // 2
            continue
        if peak <= limit:
            break
        limit = -(-peak // _STEP) * _STEP
    else:
        return None
    while limit > _STEP:  # downwards, as long as it holds
        try:
            peak = memory(job, Budget(job.checkpoint, limit - _STEP, job.needs), process).peak
        except DistayaError:
            break
        if peak > limit - _STEP:
            break
        limit -= _STEP
    return limit


def most_tokens(job: Job, process: int, there: int) -> int:
    """The most calibration tokens, in whole chunks and fewer than asked for, that fit into so many
    bytes under --max-ram of as many; 0 where none do.
    """
    if job.calibration is None:
        return 0
    each = job.calibration.windows_per_chunk * job.calibration.ids.shape[1]
    low, high = 0, -(-job.tokens // each)
    while high - low > 1:
        middle = (low + high) // 2
        if _fits(job.with_chunks(middle), process, there):
            low = middle
        else:
            high = middle
    return low * each


def _fits(job: Job, process: int, there: int) -> bool:
    try:
        return memory(job, Budget(job.checkpoint, there, job.needs), process).peak <= there
    except DistayaError:
        return False


def nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = Path(os.path.abspath(folder))
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def check_space(folder: Path, needed: int, output: int, smaller: str | None) -> None:
    """ResourceError when the disk has less than a run writes."""
    free = shutil.disk_usage(nearest(folder)).free
    if free >= needed:
        return
    ways = ["another disk (--out)"]
    if smaller is not None:
        ways.append(smaller)
    raise ResourceError(
        f"the run writes {needed / GIB:.2f} GiB beside the output folder, {output / GIB:.2f} GiB "
        f"of them the output, and only {free / GIB:.2f} GiB are free there; what would fit: "
        f"{' or '.join(ways)}"
    )
