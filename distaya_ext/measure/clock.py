"""Timing that can be believed on a shared machine.

- Contenders alternate inside one run, so that drift hits all of them; medians are kept.
- Every run records wall time, CPU time of all threads, and how long runnable threads stood in the
  scheduler's queue. A run is flagged contended when that wait exceeds 15 % of the wall time or,
  with one thread, when wall > 1.15 * cpu. (With two threads wall * 2 > cpu is also what serial
  parts look like, so there only the queue tells contention from bad scaling.)

torch is imported inside functions, and nothing of this package is: bench/harness.py loads this file
by itself, before torch and where the extension is not built.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LIMIT = 1.15


@dataclass(frozen=True)
class Sample:
    """One timed run, seconds. queue: runnable but not running, all threads together."""

    wall: float
    cpu: float
    queue: float | None
    threads: int

    @property
    def contended(self) -> bool:
        waited = self.queue is not None and self.queue > (LIMIT - 1) * self.wall
        alone = self.threads == 1 and self.wall > LIMIT * self.cpu + 1e-3
        return waited or alone


@dataclass(frozen=True)
class Timing:
    """Median of the quiet samples (of all samples when none was quiet)."""

    wall: float
    cpu: float
    runs: int
    contended: int  # how many of the runs
    threads: int

    @property
    def trusted(self) -> bool:
        return self.contended < self.runs


@dataclass(frozen=True)
class Contender:
    """prepare() makes fresh inputs outside the clock; run(*inputs) is timed."""

    name: str
    run: Callable
    prepare: Callable[[], Sequence] = tuple
    runs: int = 3


def queue_seconds() -> float | None:
    """Time this process's threads spent waiting for a core, or None where Linux does not tell."""
    total = 0
    try:
        for task in os.listdir("/proc/self/task"):
            try:
                text = Path(f"/proc/self/task/{task}/schedstat").read_text()
            except FileNotFoundError:  # a thread that ended meanwhile
                continue
            total += int(text.split()[1])
    except OSError:
        return None
    return total / 1e9 if total else None


def sample(run: Callable, inputs: Sequence, threads: int, kept: list | None = None) -> Sample:
    """One timed run; its return value goes into `kept`, whose old content is dropped first."""
    if kept is not None:
        kept.clear()
    queue, cpu, wall = queue_seconds(), time.process_time(), time.perf_counter()
    value = run(*inputs)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    after = queue_seconds()
    if kept is not None:
        kept.append(value)
    waited = None if queue is None or after is None else max(0.0, after - queue)
    return Sample(wall, cpu, waited, threads)


def summary(samples: Sequence[Sample]) -> Timing:
    """What is kept of the samples of one contender."""
    quiet = [s for s in samples if not s.contended]
    used = quiet or samples
    return Timing(
        wall=statistics.median(s.wall for s in used),
        cpu=statistics.median(s.cpu for s in used),
        runs=len(samples),
        contended=len(samples) - len(quiet),
        threads=samples[0].threads,
    )


def compare(
    contenders: Sequence[Contender],
    threads: int,
    *,
    warm: bool = True,
    extra: int = 2,
    results: dict[str, list] | None = None,
) -> dict[str, Timing]:
    """Time contenders in turn, `runs` times each; contended runs are repeated up to `extra` times.

    warm: one untimed run first, for contenders that run more than once (page faults, JIT caches).
    results: receives [last return value] per name, so that a bench can check what it timed.
    Leaves torch at `threads` threads.
    """
    import torch

    torch.set_num_threads(threads)
    samples: dict[str, list[Sample]] = {c.name: [] for c in contenders}
    kept: dict[str, list] = {} if results is None else results
    for c in contenders:
        kept[c.name] = []
    if warm:
        for c in contenders:
            if c.runs > 1:
                c.run(*c.prepare())
    for turn in range(max(c.runs for c in contenders)):
        for c in contenders:
            if turn < c.runs:
                samples[c.name].append(sample(c.run, c.prepare(), threads, kept[c.name]))
    for c in contenders:
        for _ in range(extra if c.runs > 1 else 0):
            if sum(s.contended for s in samples[c.name]) <= c.runs // 2:
                break
            samples[c.name].append(sample(c.run, c.prepare(), threads, kept[c.name]))
    return {name: summary(s) for name, s in samples.items()}


@contextmanager
def threads_kept() -> Iterator[None]:
    """Give torch its number of threads back at the end."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds(t: float) -> str:
    """A time in the unit that fits."""
    if t >= 10:
        return f"{t:.1f} s"
    return f"{t:.2f} s" if t >= 0.995 else f"{t * 1e3:.0f} ms" if t >= 0.01 else f"{t * 1e3:.2f} ms"


def machine() -> dict:
    """What a number was measured on (no host name, no path)."""
    import torch

    name = platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }
