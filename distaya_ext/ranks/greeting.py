"""Coming together: every rank is there, and all are made of the same."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..errors import LostError, UsageError
from .board import Board
from .process import Process

_STEP = 0.1  # seconds between two looks
_MADE_OF = "made of"


def greet(board: Board, device: torch.device) -> list[dict[str, Any]]:
    """The records of all ranks, in order; see own(). LostError where a rank has not come in time,
    UsageError where one is not made of the same as rank 0: one sentence that names all that is
    different.
    """
    board.greet(own(device))
    deadline = time.monotonic() + board.patience
    while not board.complete():
        failure = board.failure()
        if failure is not None or time.monotonic() > deadline:
            missing = board.missing()
            who = ", ".join(f"rank {rank}" for rank in missing)
            came = f"{board.world - len(missing)} of {board.world} ranks came"
            if failure is not None:
                raise LostError(f"{came}; rank {failure.rank} ({failure.host}): {failure.sentence}")
            raise LostError(f"{came} within {board.patience:g} s; {who} did not")
        time.sleep(_STEP)
    records = board.records()
    refuse_others(records)
    return records


def own(device: torch.device) -> dict[str, Any]:
    """Which process this rank is, what decides the bits of its results, and its threads."""
    from ..resume.identity import kernels
    from ..versions import versions

    made = {**versions(), **kernels(device), "command line": sys.argv[1:]}
    return {
        "process": asdict(Process.own()),
        _MADE_OF: made,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
    }


def processes(records: Sequence[Mapping[str, Any]]) -> list[Process]:
    return [Process(**record["process"]) for record in records]


def refuse_others(records: Sequence[Mapping[str, Any]]) -> None:
    """UsageError for the first rank that is made of something else than rank 0."""
    from ..resume.identity import difference

    first = records[0]
    for rank, record in enumerate(records):
        if record[_MADE_OF] != first[_MADE_OF]:
            here, there = first["process"]["host"], record["process"]["host"]
            differs = difference(first[_MADE_OF], record[_MADE_OF], "{name} is {new} and not {old}")
            raise UsageError(
                f"rank {rank} of {len(records)} ({there}) cannot work with rank 0 ({here}): there "
                f"{differs}"
            )


def notices(records: Sequence[Mapping[str, Any]], device: str) -> list[str]:
    """What is no error and may cost time: threads that differ, cores that nobody uses."""
    found = []
    threads = [record["threads"] for record in records]
    if len(set(threads)) > 1:
        each = ", ".join(map(str, threads))
        found.append(f"the ranks have {each} threads: the slowest decides (OMP_NUM_THREADS)")
    first = records[0]
    place, cores = first["process"]["place"], first["cores"]
    beside = [r["threads"] for r in records if r["process"]["place"] == place]
    if sum(beside) < cores and device == "cpu":
        found.append(
            f"{len(beside)} ranks with {threads[0]} threads each run on {cores} cores; "
            f"OMP_NUM_THREADS={cores // len(beside)} uses all of them"
        )
    return found
