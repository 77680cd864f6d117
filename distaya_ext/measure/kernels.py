"""`distaya bench kernels`: packed products against torch's own, in one run, out of cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ResourceError
from . import clock, limits, rulers
from .clock import Contender
from .limits import Limits, Machine
from .rulers import Subject
from .shapes import Shape

_SAMPLE = 0.02  # seconds one sample should last at least
_SLOW, _SLOWER = 0.25, 1.0  # seconds of calls that are timed only 3 times, 2 times
_RUNS = 9
_READ = "memory read"
_READS = 8  # up to so many tokens a plain read of memory takes part in the comparison
_ABOVE = 1.1  # a row this far above its limit shows that the limit was measured badly
_AGAIN = 1  # times a comparison is repeated when a contender had no quiet run


@dataclass(frozen=True)
class Plan:
    """Every kind x mode (ours) on every shape at every number of tokens and threads."""

    shapes: Sequence[Shape]
    kinds: Sequence[str]
    tokens: Sequence[int]
    threads: Sequence[int]
    modes: Sequence[str] = rulers.MODES
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    streamed: int | None = None  # bytes of copies; four times the last cache without it
    names: Sequence[str] | None = None  # subjects to keep, e.g. "int4 exact"; all without it


@dataclass(frozen=True)
class Row:
    """One subject at one number of tokens. seconds: of one call, median."""

    shape: str
    rows: int
    cols: int
    tokens: int
    threads: int
    name: str
    kind: str | None  # None: a ruler
    mode: str | None
    work: str  # which peak bounds it: int8, bf16 or fp32
    nbytes: int
    seconds: float
    gbs: float  # weight bytes over time
    gops: float  # 2 x tokens x rows x cols over time
    least: float  # seconds that the measured limits allow
    bound: str  # memory or compute: which limit that is
    reached: float  # least / seconds
    read: float | None  # GB/s of a plain read of memory that took turns with it
    ratios: dict[str, float]  # ruler -> how many times faster than it this is
    error: float | None
    runs: int
    contended: bool  # this, or a ruler that its ratios are taken of


@dataclass
class Result:
    limits: list[Limits] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def contended(self) -> list[Row]:
        return [row for row in self.rows if row.contended]


class Rotation:
    """Calls a subject on its copies in turn, `calls` times a run; returns the last product."""

    def __init__(self, subject: Subject, x: Tensor):
        self.subject, self.x = subject, x
        self.calls = 1
        self._next = 0

    def __call__(self) -> Tensor:
        copies, call, x = self.subject.copies, self.subject.call, self.x
        for _ in range(self.calls):
            y = call(x, copies[self._next])
            self._next = (self._next + 1) % len(copies)
        return y

    def calibrate(self) -> float:
        """Warm up, then choose `calls` so that a run can be timed. Returns seconds of a call."""
        self()
        once = clock.sample(self, (), 1).wall
        self.calls = max(1, math.ceil(_SAMPLE / max(once, 1e-6)))
        return once


class GraphRotation(Rotation):
    """The same on a GPU: one CUDA graph of a call on every copy, so that no launch is timed."""

    def __init__(self, subject: Subject, x: Tensor):
        super().__init__(subject, x)
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):  # warm: workspaces and handles must exist before capture
            for copy in subject.copies[:3]:
                subject.call(x, copy)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        with torch.cuda.graph(self._graph):
            for copy in subject.copies:
                self.y = subject.call(x, copy)

    def __call__(self) -> Tensor:
        for _ in range(self.calls // len(self.subject.copies)):
            self._graph.replay()
        torch.cuda.synchronize(self.x.device)
        return self.y

    def calibrate(self) -> float:
        self.calls = len(self.subject.copies)
        self()
        once = clock.sample(self, (), 1).wall / self.calls
        self.calls *= max(1, math.ceil(_SAMPLE / max(once * self.calls, 1e-6)))
        return once


def needed_bytes(shape: Shape, kinds: Sequence[str], streamed: int) -> int:
    """A rough upper bound on what measuring a shape takes: copies, and what packing makes."""
    per_weight = [2.0, 0.53] + [1.04 if kind == "int8" else 0.53 for kind in kinds]
    copies = sum(max(streamed + each * shape.weights, 0) for each in per_weight)
    return int(copies + 6 * shape.weights)


def measure(
    plan: Plan,
    *,
    machine: Machine | None = None,
    on_row: Callable[[Row], Any] = lambda row: None,
    on_note: Callable[[str], Any] = lambda note: None,
) -> Result:
    """Run the plan. ResourceError when not one of its shapes fits into memory.

    machine: whose limits hold; they are measured again before every comparison.
    A shape that does not fit is told in Result.notes. RuntimeError when a kernel computes something
    else than its weights say.
    """
    result = Result()

    def note(text: str) -> None:
        result.notes.append(text)
        on_note(text)

    with clock.threads_kept(), torch.inference_mode():
        streamed = plan.streamed or 4 * limits.cache_bytes(plan.device)
        machine = machine or Machine(plan.device)
        for threads in plan.threads:
            note(limits.describe(machine.at(threads)))
        for shape in plan.shapes:
            kinds = rulers.kinds_of(shape, plan.kinds)
            if not kinds:
                note(f"{shape.name} left out: it is kept in int8, which is not among the kinds")
                continue
            need, free = needed_bytes(shape, kinds, streamed), limits.free_bytes(plan.device)
            if need > free:
                note(
                    f"{shape.name} left out: it needs {need / 2**30:.1f} GiB of memory and "
                    f"{free / 2**30:.1f} GiB are free"
                )
                continue
            for row in _shape(shape, kinds, plan, streamed, machine):
                result.rows.append(row)
                on_row(row)
        if not result.rows:
            raise ResourceError(f"nothing could be measured: {'; '.join(result.notes[-3:])}")
        machine.peaks()
        result.limits = [machine.at(threads) for threads in plan.threads]
    result.rows = limited(result.rows, result.limits)
    above = sum(row.reached > _ABOVE for row in result.rows)
    if above:
        note(
            f"{above} of {len(result.rows)} rows are faster than the limits say: something else "
            "ran while those were measured"
        )
    return result


def limited(found: Sequence[Row], of: Sequence[Limits]) -> list[Row]:
    """The rows held against these limits."""
    by_threads = {limit.threads: limit for limit in of}
    out = []
    for row in found:
        ops = 2.0 * row.tokens * row.rows * row.cols
        least, bound = by_threads[row.threads].seconds(row.nbytes, ops, row.work)
        out.append(replace(row, least=least, bound=bound, reached=least / row.seconds))
    return out


def _shape(
    shape: Shape, kinds: list[str], plan: Plan, streamed: int, machine: Machine
) -> Iterator[Row]:
    """Rows of one shape; its weights live only as long as this runs."""
    torch.set_num_threads(max(plan.threads))
    subjects = rulers.rulers(shape, kinds, streamed, plan.device)
    modes = plan.modes
    if plan.device.type == "cuda":  # there is no other mode on a GPU
        modes = ["exact"]
    for kind in kinds:
        subjects += rulers.ours(shape, kind, modes, streamed, plan.device)
    if plan.names is not None:
        subjects = [s for s in subjects if s.name in plan.names]
    for tokens in plan.tokens:
        random = torch.Generator(plan.device).manual_seed(tokens)
        size = (tokens, shape.cols)
        x = torch.randn(size, generator=random, device=plan.device).to(torch.bfloat16)
        errors = {s.name: rulers.check(s, x) for s in subjects if s.kind}
        for threads in plan.threads:
            reader = machine if tokens <= _READS else None
            yield from rows(shape, subjects, x, machine.at(threads), errors, reader)


def rotation(subject: Subject, x: Tensor) -> Rotation:
    """What calls the subject on x: a CUDA graph on a GPU."""
    return GraphRotation(subject, x) if x.is_cuda else Rotation(subject, x)


def rows(
    shape: Shape,
    subjects: Sequence[Subject],
    x: Tensor,
    limit: Limits,
    errors: dict[str, float] | None = None,
    reader: Machine | None = None,
) -> list[Row]:
    """Every subject on the same activations [tokens, cols], alternating, and reader's plain read.

    The bandwidth of a shared machine drifts within a run, so a share of it is only worth something
    beside a read of the same seconds.
    """
    torch.set_num_threads(limit.threads)
    rotations = {s.name: rotation(s, x) for s in subjects}
    contenders = []
    for name, calls in rotations.items():
        once = calls.calibrate()
        runs = _RUNS if once < _SLOW else 3 if once < _SLOWER else 2
        contenders.append(Contender(name, calls, runs=runs))
    if reader is not None:  # between the rulers and ours
        first = sum(s.kind is None for s in subjects)
        contenders.insert(first, Contender(_READ, reader.read, runs=_RUNS))
    timings = clock.compare(contenders, limit.threads, warm=False)
    for _ in range(_AGAIN):
        if all(timing.trusted for timing in timings.values()):
            break
        timings = clock.compare(contenders, limit.threads, warm=False)
    read = reader.read_bytes / timings[_READ].wall / 1e9 if reader is not None else None
    each = {name: timings[name].wall / rotations[name].calls for name in rotations}
    ruled = [s.name for s in subjects if s.kind is None]
    spoilt = {name for name, timing in timings.items() if not timing.trusted}
    found = []
    ops = 2.0 * len(x) * shape.weights
    for s in subjects:
        spent = each[s.name]
        least, bound = limit.seconds(s.nbytes, ops, s.work)
        found.append(
            Row(
                shape=shape.name,
                rows=shape.rows,
                cols=shape.cols,
                tokens=len(x),
                threads=limit.threads,
                name=s.name,
                kind=s.kind,
                mode=s.mode,
                work=s.work,
                nbytes=s.nbytes,
                seconds=spent,
                gbs=s.nbytes / spent / 1e9,
                gops=ops / spent / 1e9,
                least=least,
                bound=bound,
                reached=least / spent,
                read=read,
                ratios={name: each[name] / spent for name in ruled},
                error=(errors or {}).get(s.name),
                runs=timings[s.name].runs,
                contended=s.name in spoilt or bool(spoilt & set(ruled)),
            )
        )
    return found
