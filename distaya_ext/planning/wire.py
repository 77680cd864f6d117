"""How fast bytes go from rank to rank: as the user says, or as two processes of this host pass them
to each other, which is no statement about any other network.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ResourceError, UsageError

_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]i?)?(B|bit)/s")
_UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS |= {f"{unit}i": 1 << 10 * (power + 1) for power, unit in enumerate("kMGT")}
_ELEMENTS = 1 << 22  # fp32, of each exchange that is timed
_TIMES = 5
_PATIENCE = 120  # seconds


@dataclass(frozen=True)
class Wire:
    """rate: bytes a second into a rank, and as many out of it at the same time; source: where that
    is known from.
    """

    rate: float
    source: str

    def to_dict(self) -> dict[str, Any]:
        return {"bytes_per_second": self.rate, "source": self.source}


def given(text: str) -> Wire:
    """Of "10GB/s", "400MiB/s", "100Gbit/s". UsageError for anything else and for nothing at all."""
    found = _RATE.fullmatch(text.strip())
    rate = (
        float(found[1]) * _UNITS[found[2] or ""] / (8 if found[3] == "bit" else 1) if found else 0
    )
    if not rate:
        raise UsageError(f"wire {text!r} is not a rate above 0 such as 10GB/s or 100Gbit/s")
    return Wire(rate, "given")


def asked(ranks: Sequence[int], text: str | None) -> Wire | None:
    """What the user gave for these numbers of ranks. UsageError as given(), and without ranks."""
    if text is None:
        return None
    if not ranks:
        raise UsageError("wire says how fast ranks reach each other, so it needs --ranks")
    return given(text)


def measured() -> Wire:
    """Between two processes of this host, over gloo as ranks on the CPU do it. ResourceError when
    they do not answer.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(p for p in [*sys.path, os.environ.get("PYTHONPATH", "")] if p)
    told = {"PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    told |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **told, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        ends = [process.communicate(timeout=_PATIENCE) for process in processes]
    except subprocess.TimeoutExpired:
        raise ResourceError(
            f"two processes of this host did not pass {4 * _ELEMENTS >> 20} MiB to each other "
            f"within {_PATIENCE} s; say how fast the network is with --wire"
        ) from None
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(process.returncode for process in processes):
        last = (ends[0][1].strip().splitlines() or ["they said nothing"])[-1]
        raise ResourceError(
            f"two processes of this host could not pass bytes to each other ({last[:200]}); say "
            "how fast the network is with --wire"
        )
    return Wire(float(ends[0][0].split()[-1]), "measured between two processes of this host")


def main() -> None:
    """One of the two: exchange pieces, tell the median rate."""
    import statistics

    import torch

    from ..ranks import joined

    torch.set_num_threads(1)
    with joined() as us:
        half = torch.ones(_ELEMENTS)
        rates = []
        for _ in range(_TIMES + 1):  # the first one makes the connection
            us.wait()
            start = time.perf_counter()
            us.exchange([half, half], [_ELEMENTS, _ELEMENTS])
            rates.append(half.nbytes / (time.perf_counter() - start))
    print(statistics.median(rates[1:]))


if __name__ == "__main__":
    main()
