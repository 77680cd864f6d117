"""What this machine can do at best, measured in the same run as the numbers beside it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ..ops import machine
from . import clock

_CACHE_UNKNOWN = 32 << 20  # taken for the last cache where the system does not tell


@dataclass(frozen=True)
class Limits:
    """read in GB/s, the others in GOP/s; None where nothing here measures it."""

    threads: int
    read: float
    int8: float | None
    bf16: float | None
    fp32: float | None

    def peak(self, work: str) -> float | None:
        """Rate of the instructions that do `work`: int8, bf16 or fp32."""
        return getattr(self, work)

    def seconds(self, nbytes: int, ops: float, work: str) -> tuple[float, str]:
        """The least time for reading nbytes and doing ops, and which of the two it is."""
        memory = nbytes / self.read / 1e9
        peak = self.peak(work)
        compute = ops / peak / 1e9 if peak else 0.0
        return (memory, "memory") if memory >= compute else (compute, "compute")


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [_CACHE_UNKNOWN]
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            text = re.fullmatch(r"(\d+)([KM])", (index / "size").read_text().strip())
        except OSError:
            continue
        if text:
            sizes.append(int(text[1]) << (10 if text[2] == "K" else 20))
    return max(sizes)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken; on the CPU what Linux calls available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) << 10 if found else 8 << 30


class Machine:
    """The limits of a device, asked again and again: of each the best that was ever seen.

    A ceiling measured once, in a moment when a neighbour was reading, is lower than what is then
    measured under it. nbytes: how much is read at a time; five times the last cache, at least 256
    MiB, without it.
    """

    def __init__(self, device: torch.device, nbytes: int | None = None) -> None:
        self.device = device
        nbytes = nbytes or max(256 << 20, 5 * cache_bytes(device))
        self._big = torch.ones(nbytes, dtype=torch.uint8, device=device)
        self._read: dict[int, float] = {}
        self._peak: dict[str, float] = {}

    def at(self, threads: int) -> Limits:
        """Read once more (some 30 ms) with so many threads; torch keeps that number of threads."""
        torch.set_num_threads(threads)
        rate = self._big.numel() / _best(self.read, threads, 3) / 1e9
        self._read[threads] = max(rate, self._read.get(threads, 0.0))
        if not self._peak:
            self.peaks()
        each = {name: rate * threads or None for name, rate in self._peak.items()}
        names = (each.get("int8_dot"), each.get("bf16_dot"), each.get("fp32"))
        return Limits(threads, self._read[threads], *names)

    def peaks(self) -> None:
        """Measure the peaks, again: register-only loops, or torch's bf16 product on a GPU."""
        if self.device.type == "cuda":
            found = {"bf16_dot": _product_rate(self.device)}
        else:
            found = machine.peak()
        for name, rate in found.items():
            self._peak[name] = max(rate, self._peak.get(name, 0.0))

    @property
    def read_bytes(self) -> int:
        """What read() reads."""
        return self._big.numel()

    def read(self) -> None:
        """Read memory once, and do nothing with it."""
        if self.device.type == "cuda":
            self._big.view(torch.int64).sum()
            _finish(self.device)
        else:
            machine.read(self._big)


def _product_rate(device: torch.device, n: int = 8192) -> float:
    A = torch.randn(n, n, device=device, dtype=torch.bfloat16)

    def multiply() -> None:
        A @ A
        _finish(device)

    return 2 * n**3 / _best(multiply, 1, 5) / 1e9


def _best(run, threads: int, runs: int) -> float:
    run()
    return min(clock.sample(run, (), threads).wall for _ in range(runs))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(found: Limits) -> str:
    """One line, e.g. "2 threads: memory read 45 GB/s, int8 dot 1906 GOP/s"."""
    parts = [f"memory read {found.read:.0f} GB/s"]
    for label, rate in (("int8", found.int8), ("bf16", found.bf16), ("fp32", found.fp32)):
        if rate:
            parts.append(f"{label} peak {rate:.0f} GOP/s")
    return f"{found.threads} thread{'s' * (found.threads > 1)}: " + ", ".join(parts)
