"""Between host and device without waiting for either: what a layer needs comes ahead of it, what it
gives follows behind.

Where the device has a queue of its own (CUDA), the host only fills that queue: it never reads a
value before all work of the layer is queued. Weights of the next layer are read from disk by a
thread and copied on a stream of their own; results go to pinned memory on another, and a thread
checks and writes them while the next layer computes. The host is at most one layer ahead, so memory
stays bounded. On the CPU everything happens where it stands in the code; only in a run of several
processes the one that writes does so behind the others' backs, in that same thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..finite import all_finite


def runs_late(device: torch.device) -> bool:
    """Whether the host runs ahead of the device and looks at its results later."""
    return device.type == "cuda"


class Checks:
    """What must hold of values on the device: judged at once or, late, when they have come home."""

    def __init__(self, late: bool):
        self.late = late
        self._kept: list[tuple[Callable[..., None], tuple[Tensor, ...]]] = []

    def expect(self, judge: Callable[..., None], *facts: Tensor) -> None:
        """judge(*facts) raises when something is wrong; late, it gets copies on the host."""
        if self.late:
            self._kept.append((judge, facts))
        else:
            judge(*facts)

    def finite(self, x: Tensor, complain: Callable[[], Any]) -> None:
        """complain() raises; it is called when x holds NaN or infinity."""
        if not self.late:
            if not all_finite(x):
                complain()
        elif x.numel():
            self.expect(lambda *ends: None if all(map(all_finite, ends)) else complain(), *ends(x))

    def take(self) -> list[tuple[Callable[..., None], tuple[Tensor, ...]]]:
        """What was kept since the last time, in order; see judge."""
        kept, self._kept = self._kept, []
        return kept


def judge(kept: list[tuple[Callable[..., None], tuple[Tensor, ...]]]) -> None:
    """Judge what Checks.take gave, once it is on the host; the first that is wrong raises."""
    for verdict, facts in kept:
        verdict(*facts)


def ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest element; NaN passes through."""
    return x.detach().aminmax()


class Ferry:
    """Use as a context manager: leaving it ends its threads, whatever happened."""

    def __init__(self, device: torch.device, *, behind: bool = False):
        self.device = device
        self.late = runs_late(device)
        self._behind = self.late or behind
        cuda = device.type == "cuda"
        self._up = torch.cuda.Stream(device) if cuda else None  # weights, host to device
        self._down = torch.cuda.Stream(device) if cuda else None  # results, device to host
        self._reader, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._waiting: deque[tuple[Future, Callable[[Any], None]]] = deque()
        self._older = 0  # of those waiting, how many the last turn had seen

    def __enter__(self) -> Ferry:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._reader, self._writer):
            pool.shutdown(cancel_futures=True)

    # ---- what comes ----

    def ahead(self, reads: Iterable[Callable[[], dict[str, Tensor]]]) -> Iterator[dict]:
        """Results of reads, one after the other, on the device; late, the next is under way."""
        if not self.late:
            yield from (read() for read in reads)
            return
        coming: deque[Future] = deque()
        for read in reads:
            coming.append(self._reader.submit(self._fetch, read))
            if len(coming) > 1:
                yield self._here(*coming.popleft().result())
        yield self._here(*coming.popleft().result())

    def _fetch(self, read: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], Any]:
        found = read()
        if self._up is None:
            return found, None
        with torch.cuda.stream(self._up):
            for name in list(found):
                pinned = torch.empty_like(found[name], device="cpu", pin_memory=True)
                found[name] = pinned.copy_(found[name]).to(self.device, non_blocking=True)
            return found, self._up.record_event()

    def _here(self, found: dict[str, Tensor], arrived: Any) -> dict[str, Tensor]:
        """Let the queue of the work, not the host, wait for the copies."""
        if arrived is not None:
            work = torch.cuda.current_stream(self.device)
            work.wait_event(arrived)
            for tensor in found.values():
                tensor.record_stream(work)
        return found

    # ---- what goes ----

    def home(self, tree: Any) -> Callable[[], Any]:
        """Start copying the tensors of tree (dicts, lists and tuples of them and anything) to the
        host; the function returned waits, in whichever thread, and gives the same tree there.
        """
        if self._down is None:
            return lambda: tree
        self._down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._down):
            copies = _each(self._copy, tree)
            arrived = self._down.record_event()

        def wait() -> Any:
            arrived.synchronize()
            return copies

        return wait

    def _copy(self, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor
        tensor.record_stream(self._down)
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)

    def do(self, job: Callable[[], Any], then: Callable[[Any], None] = lambda _: None) -> None:
        """job() and then then(its result). Late, or behind: job in a thread, in the order they
        came, then in the caller's thread in a later turn().
        """
        if self._behind:
            self._waiting.append((self._writer.submit(job), then))
        else:
            then(job())

    def turn(self) -> None:
        """A layer is queued: finish what was queued before the last turn. Raises what it raised."""
        self._finish(self._older)
        self._older = len(self._waiting)

    def land(self) -> None:
        """Finish everything."""
        self._finish(len(self._waiting))
        self._older = 0

    def _finish(self, count: int) -> None:
        for _ in range(count):
            job, then = self._waiting.popleft()
            then(job.result())

    # ---- the clock ----

    def mark(self) -> Any:
        """A moment of the work, for seconds()."""
        if self._down is None:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self.device))
        return mark

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two marks that have passed (what was sent home after them is there)."""
        return end - begin if self._down is None else begin.elapsed_time(end) / 1e3


def _each(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _each(change, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_each(change, value) for value in tree)
    return tree
