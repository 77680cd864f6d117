"""The device a user names, checked before any work is done for it."""

from __future__ import annotations

import torch

from .errors import UsageError
from .ops import machine
from .ranks import team


def find_device(name: str, *, kernels: bool = False) -> torch.device:
    """torch.device of "cpu", "cuda" or "cuda:N". UsageError when it is another or not there.

    Under torchrun "cuda" is the GPU of this rank, and "cuda:N" is refused where ranks share a host.
    kernels=True also asks that our own kernels were built for it.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r} is unknown; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported; use cpu or cuda")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise UsageError(f"device {name} is asked for and torch sees no CUDA GPU")
    us = team()
    if us.local_world > 1 and device.index not in (None, us.local_rank):
        raise UsageError(
            f"device {name} is asked for by {us.local_world} ranks of one host; with --device cuda "
            "each has its own GPU"
        )
    if not us.alone and device.index is None:
        device = torch.device("cuda", us.local_rank)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UsageError(
            f"device {name} is asked for and torch sees {torch.cuda.device_count()} CUDA GPUs"
        )
    status = machine.cuda_status()["status"]
    if kernels and status != "ok":
        raise UsageError(f"device {name} is asked for and our kernels cannot use it: {status}")
    return device
