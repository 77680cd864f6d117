"""How bench/gpu.py takes time: CUDA events around one call, or around a CUDA graph of many."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence

AIM, MOST = 2e-3, 256  # seconds that one graph should take, and calls that it holds at most


class Clock:
    """Seconds of one call: CUDA events on a GPU, the wall clock on the CPU (smoke tests).

    Before every start event a large buffer is filled: that empties the cache and keeps the device
    busy while Python queues the call, so that the events do not measure Python.
    """

    def __init__(self, device: str):
        import torch

        self.cuda = device == "cuda"
        if self.cuda:
            from bench.gpu_case import cache_bytes

            nbytes = max(512 << 20, 4 * cache_bytes(device))
            self.filler = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.side = torch.cuda.Stream()  # where graphs are captured

    def seconds(self, call: Callable, arguments: Sequence) -> float:
        if not self.cuda:
            begin = time.perf_counter()
            call(*arguments)
            return time.perf_counter() - begin
        self.filler.zero_()
        self.start.record()
        call(*arguments)
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3

    def each(self, call: Callable, inputs: Sequence) -> Callable[[int], float]:
        """turn -> seconds of one call on the inputs of that turn."""
        return lambda turn: self.seconds(call, inputs[turn % len(inputs)])

    def graph(self, call: Callable, inputs: Sequence) -> Callable[[int], float]:
        """turn -> seconds of one call, out of a CUDA graph of calls on all inputs in turn.

        RuntimeError where the call cannot be captured.
        """
        import torch

        once = self.seconds(call, inputs[0])  # warm from the check that came before
        rounds = math.ceil(max(1, min(MOST, AIM / max(once, 1e-7))) / len(inputs))
        graph, main = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            for arguments in inputs[:2]:  # handles and workspaces must exist before the capture
                call(*arguments)
            graph.capture_begin()  # torch.cuda.graph would empty the allocator's cache each time
            try:
                for arguments in [*inputs] * rounds:
                    call(*arguments)
            except BaseException:
                with contextlib.suppress(RuntimeError):  # it says no more than that it was broken
                    graph.capture_end()
                raise
            graph.capture_end()
        main.wait_stream(self.side)
        calls = rounds * len(inputs)
        return lambda _turn: self.seconds(graph.replay, ()) / calls


def ceilings(clock: Clock, device: str, quick: bool) -> dict[str, float]:
    """Best of ten: GB/s of a copy (read + written), GFLOP/s of square bf16 and fp32 products."""
    import torch

    n = 256 if quick else 8192
    A, B = (torch.randn(n, n, device=device) for _ in range(2))
    source = torch.randn((1 << 20) if quick else (1 << 28), device=device)  # 1 GiB
    target = torch.empty_like(source)

    def rate(work: float, call: Callable, *arguments) -> float:
        call(*arguments)
        return work / min(clock.seconds(call, arguments) for _ in range(10))

    return {
        "copy": rate(2 * source.nbytes / 1e9, target.copy_, source),
        "bf16": rate(2 * n**3 / 1e9, torch.mm, A.bfloat16(), B.bfloat16()),
        "fp32": rate(2 * n**3 / 1e9, torch.mm, A, B),
    }
