"""Becoming one of the ranks that torchrun has started."""

from __future__ import annotations

import atexit
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import DistayaError, LostError, UsageError, one_line
from .board import Board
from .greeting import greet, notices, processes
from .team import Team, acting
from .watch import SILENCE, Watch, leave

TIMEOUT = "DISTAYA_RANK_TIMEOUT"  # seconds that ranks wait for each other
SILENT = "DISTAYA_RANK_SILENCE"  # seconds without a sign of life after which a rank is lost
_PATIENCE = 1800.0
_MOST = 7 * 86400  # of both
_TAKE_DOWN = 3.0  # seconds
_WAYS = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells beside WORLD_SIZE


def world_size() -> int:
    """How many processes torchrun has started for this run; 1 without it."""
    return _number("WORLD_SIZE", 1)


@contextmanager
def joined(device: str = "cpu") -> Iterator[Team]:
    """Inside, team() is the ranks that torchrun has started (without it: this process alone). The
    block ends when that of every rank has ended.

    device: "cuda" has the ranks of a host take its GPUs in order and sum with NCCL. UsageError for
    an environment that is not torchrun's, for ranks that are not made of the same, and for more
    ranks than GPUs; LostError when another rank fails, is lost or does not come in time.
    """
    if world_size() == 1:
        yield Team()
        return
    try:
        silence, board = _seconds(SILENT, SILENCE), _board()
        watch, made = Watch(board, silence), None
    except DistayaError as error:  # the others cannot be asked: one of each host speaks
        error.quiet = _number("LOCAL_RANK", 0) > 0  # type: ignore[attr-defined]
        raise
    try:
        made = _come_together(device, board, watch)
        with acting(made):
            yield made
            made.wait()
    except BaseException as error:
        found = watch.ending(error)
        if made is not None and not _taken_down(made):
            atexit.register(leave, LostError.exit_code)  # or the end of Python waits for it
        if found is error:
            raise
        raise found from None
    watch.close()
    dist.destroy_process_group()


def take_gpu(device: str) -> bool:
    """Whether this rank works on a GPU, which is then torch's current one. UsageError where the
    ranks of this host cannot have one each.
    """
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return False
    beside, count = _number("LOCAL_WORLD_SIZE", 1), torch.cuda.device_count()
    if device != "cuda" and beside > 1:
        raise UsageError(
            f"device {device} is asked for by {beside} ranks of one host; with --device cuda each "
            "has its own GPU"
        )
    if beside > count:
        raise UsageError(
            f"{beside} ranks run on one host and torch sees {count} CUDA GPUs there; start "
            f"{count} with --nproc-per-node {count}"
        )
    torch.cuda.set_device(_number("LOCAL_RANK", 0) if device == "cuda" else torch.device(device))
    return True


def _board() -> Board:
    """The connection to the store, which rank 0 keeps where torchrun's agent does not."""
    absent = [name for name in _WAYS if name not in os.environ]
    if absent:
        raise UsageError(
            f"WORLD_SIZE says {os.environ['WORLD_SIZE']} processes, but {', '.join(absent)} are "
            "not set; start them with torchrun"
        )
    rank, world = _number("RANK", 0), world_size()
    if rank >= world:
        raise UsageError(f"RANK is {rank} of WORLD_SIZE {world}; the ranks are 0 to {world - 1}")
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    patience = _seconds(TIMEOUT, _PATIENCE)
    try:
        return Board(rank, world, patience, keeps)
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LostError(
            f"rank {rank} of {world} has no store at {where}: {one_line(error)}"
        ) from None


def _come_together(device: str, board: Board, watch: Watch) -> Team:
    cuda = take_gpu(device)
    place = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    try:
        records = greet(board, place)
        watch.start(processes(records))
        made = _team(board, cuda, watch)
    except RuntimeError as error:  # of the store or a backend
        raise watch.lost(error) from None
    made.notices = notices(records, place.type)
    return made


def _team(board: Board, cuda: bool, watch: Watch) -> Team:
    patience = timedelta(seconds=board.patience)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=board.group_store(),
        rank=board.rank,
        world_size=board.world,
        timeout=patience,
    )
    made = Team(
        board.rank,
        board.world,
        _number("LOCAL_RANK", 0),
        _number("LOCAL_WORLD_SIZE", 1),
        dist.new_group(backend="gloo", timeout=patience),
        watch,
    )
    watch.begun = lambda: made.begun
    return made


def _taken_down(made: Team) -> bool:
    """Whether the groups are gone. One in which a collective was given up, or which another thread
    still uses, would hold this process up.
    """
    if made.left_behind:
        return False
    taking = threading.Thread(target=dist.destroy_process_group, daemon=True)
    taking.start()
    taking.join(_TAKE_DOWN)
    return not taking.is_alive()


def _number(name: str, without: int) -> int:
    told = os.environ.get(name, str(without))
    if not told.isdecimal():
        raise UsageError(f"{name} must be a whole number, as torchrun sets it, not {told!r}")
    return int(told)


def _seconds(name: str, without: float) -> float:
    told = os.environ.get(name, str(without))
    try:
        found = float(told)
    except ValueError:
        found = math.nan
    if not 1 <= found <= _MOST:  # nan is not
        raise UsageError(f"{name} must be seconds from 1 to {_MOST}, not {told!r}")
    return found
