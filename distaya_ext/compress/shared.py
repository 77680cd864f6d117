"""What the processes of a run must agree on before it begins: texts, parts, everything it is made
of.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import UsageError
from ..ranks import team
from ..recipe import Recipe
from ..resume import difference
from .calibrate import Calibration, load_calibration

_NOT_TOLD = ("ids", "parts")


def shared_calibration(texts: Any, recipe: Recipe, checkpoint: Checkpoint) -> Calibration:
    """load_calibration by rank 0, which reads and cuts the texts; the windows on every rank."""
    us = team()
    if us.alone:
        return load_calibration(texts, recipe, checkpoint)
    found = load_calibration(texts, recipe, checkpoint) if us.first else None
    told = None
    if found is not None:
        told = {f.name: getattr(found, f.name) for f in fields(found) if f.name not in _NOT_TOLD}
    told = us.tell(told)
    return Calibration(us.from_first(None if found is None else found.ids), **told)


def parts_of(before: Mapping[str, Any] | None) -> int | None:
    """In how many parts a run that was stopped has summed; before: what it was made of."""
    if before is None:
        return None
    return before.get("recipe", {}).get("calibration", {}).get("parts") or 1


def check_parts(count: int, calibration: Calibration, asked: int | None) -> None:
    """UsageError for more parts than windows."""
    windows, length = calibration.ids.shape
    if count > windows:
        who = f"calibration.parts is {count}" if asked else f"{count} processes were started"
        raise UsageError(
            f"{who}, but the calibration has {windows} windows of {length} tokens, and each needs "
            f"one at least; use at most {windows}, more tokens or shorter windows"
        )


def same_for_all(made_of: dict[str, Any]) -> dict[str, Any]:
    """What the run is made of; UsageError on every rank when it is not the same on all of them."""
    for rank, other in enumerate(team().gather(made_of)):
        if rank == 0:
            first = other
        elif other != first:
            raise UsageError(
                f"rank {rank} is at another run than rank 0: {difference(first, other)}"
            )
    return made_of


def told_of_ranks(calibration: Calibration | None) -> list[dict[str, Any]]:
    """What each process of the run had to do, for its report; nothing where there is one alone.

    windows: of the calibration; read: bytes of the checkpoint from the disk; sent: bytes given to
    others; waited: seconds, for others or for the wire.
    """
    us = team()
    if us.alone:
        return []
    windows = 0
    if calibration is not None:
        windows = calibration.own_tokens // calibration.ids.shape[1]
    about = {"windows": windows, "read": us.read, "sent": us.sent, "waited": round(us.waited, 3)}
    return us.gather(about)


@contextmanager
def spill_folder(scratch: Path, spill: Path | None) -> Iterator[Path]:
    """Where this process's activations wait: `scratch`, which goes with the run, or a folder of its
    own in `spill`.
    """
    if spill is None:
        yield scratch
        return
    if not spill.is_dir():
        raise UsageError(f"{spill} is no folder that activations could wait in")
    with tempfile.TemporaryDirectory(dir=spill, prefix="distaya-spill-") as folder:
        yield Path(folder)
