"""The kernels for hours and from many sides: concurrent callers, and 10^4 calls of every room."""

import gc
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from every_op import CASES, same

from distaya_ext.ops import cholesky

CALLERS = 8
CALLS = 10_000
# Doors that one call of a case goes through, at least: how often it must be called for CALLS.
DOORS = {
    "moments": 7,
    "factors": 4,
    "masks": 14,
    "gated": 5,
    "sweeps": 7,
    "refits": 9,
    "influences": 4,
    "packing": 30,
    "products": 20,
}
LEAK = 32  # bytes per call: less than any allocation of a kernel or of torch


def test_all_rooms_are_here():
    assert set(DOORS) == set(CASES)


def test_eight_callers_get_what_one_gets(threads):
    """Each caller has its own inputs, runs every room, begins with another one, and none waits."""
    calls = [[make(10 * who, 1) for make in CASES.values()] for who in range(CALLERS)]
    expected = [[call() for call in own] for own in calls]
    together = threading.Barrier(CALLERS, timeout=60)

    def caller(who: int) -> list[str]:
        together.wait()
        wrong = []
        for turn in range(2 * len(CASES)):
            room = (who + turn) % len(CASES)
            if not same(calls[who][room](), expected[who][room]):
                wrong.append(f"caller {who}: {list(CASES)[room]}")
        return wrong

    before = psutil.Process().num_threads()
    with ThreadPoolExecutor(CALLERS) as pool:
        assert [found for own in pool.map(caller, range(CALLERS)) for found in own] == []
    for _ in range(100):  # each caller had a pool of its own, which goes with it
        if psutil.Process().num_threads() <= before:
            break
        time.sleep(0.05)
    assert psutil.Process().num_threads() <= before


def test_a_long_kernel_leaves_python_to_others():
    """The interpreter's lock is released: this thread goes on while another one factorises."""
    H = torch.eye(3000)
    worker = threading.Thread(target=lambda: cholesky.cholesky(H, overwrite=True))
    began = last = time.perf_counter()
    longest = 0.0
    worker.start()
    while worker.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    worker.join()
    assert longest < 0.5 * (last - began)  # a held lock makes it all of it


def resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


@pytest.mark.parametrize("name", CASES)
def test_ten_thousand_calls_leave_nothing_behind(name):
    """Memory, files and threads after 10^4 calls are those after the first tenth.

    Once memory has settled, a leak of LEAK bytes per call would show; what the allocator does with
    freed pages does not repeat, so that the flattest third of the run is judged.
    """
    call, process = CASES[name](1, 1), psutil.Process()
    rounds = -(-CALLS // DOORS[name])
    for _ in range(rounds // 10):
        call()
    files, threads_now = process.num_fds(), process.num_threads()
    growth = []
    for _ in range(3):
        before = resident()
        for _ in range(rounds // 3):
            call()
        growth.append(resident() - before)
    assert min(growth) < LEAK * CALLS / 3, growth
    assert (process.num_fds(), process.num_threads()) == (files, threads_now)
    assert len(os.listdir("/proc/self/task")) == threads_now
