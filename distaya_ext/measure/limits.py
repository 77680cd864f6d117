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


def read_bandwidth(threads: int, nbytes: int, device: torch.device, runs: int = 5) -> float:
    """GB/s of a sum over nbytes, all threads together, the best of the runs."""
    big = torch.ones(nbytes // 8, dtype=torch.float64, device=device)

    def read() -> None:
        big.sum()
        _finish(device)

    return big.numel() * 8 / _best(read, threads, runs) / 1e9


def measure(threads: int, device: torch.device, *, nbytes: int | None = None) -> Limits:
    """nbytes: how much is read; five times the last cache, at least 256 MiB, without it.

    Sets torch's threads. The peaks are the extension's register-only loops times the threads; on a
    GPU the bf16 one is torch's product of two squares.
    """
    torch.set_num_threads(threads)
    nbytes = nbytes or max(256 << 20, 5 * cache_bytes(device))
    read = read_bandwidth(threads, nbytes, device)
    if device.type == "cuda":
        return Limits(threads, read, None, _product_rate(device), None)
    peak = machine.peak()

    def all_threads(name: str) -> float | None:
        return peak[name] * threads if peak[name] else None

    return Limits(
        threads, read, all_threads("int8_dot"), all_threads("bf16_dot"), all_threads("fp32")
    )


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
