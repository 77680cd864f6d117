"""Becoming one of the ranks that torchrun has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import UsageError
from .team import Team, acting

TIMEOUT = "DISTAYA_RANK_TIMEOUT"  # seconds that ranks wait for each other
_PATIENCE = 1800.0


def world_size() -> int:
    """How many processes torchrun has started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str = "cpu") -> Iterator[Team]:
    """Inside, team() is the ranks that torchrun has started (without it: this process alone).

    device: "cuda" has the ranks of a host take its GPUs in order and sum with NCCL. UsageError for
    an environment that is not torchrun's.
    """
    if world_size() == 1:
        yield Team()
        return
    absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if absent:
        raise UsageError(
            f"WORLD_SIZE says {os.environ['WORLD_SIZE']} processes, but {', '.join(absent)} are "
            "not set; start them with torchrun"
        )
    cuda = device.startswith("cuda") and torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local)
    patience = timedelta(seconds=float(os.environ.get(TIMEOUT, _PATIENCE)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=patience)
    try:
        reading = dist.new_group(backend="gloo", timeout=patience)
        made = Team(
            dist.get_rank(),
            dist.get_world_size(),
            local,
            int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            reading,
        )
        with acting(made):
            yield made
    finally:
        dist.destroy_process_group()
