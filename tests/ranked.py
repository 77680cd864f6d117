"""Ranks for tests: N processes that form one gloo team and call a function, without torchrun.

They are forked from a server that has imported everything and computed nothing, so they start in
an instant and none of them has ever used a thread of OpenMP or MKL.
"""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import pytest

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed", "transformers", "distaya_ext.compress"])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(world: int, rank: int, port: int) -> dict[str, str]:
    """What torchrun tells a process on one host."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _work(
    told: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...], join: bool, pipe: Any
) -> None:
    os.environ.update(told)
    import torch

    torch.set_num_threads(1)
    from distaya_ext.ranks import joined

    try:
        if told["WORLD_SIZE"] == "1" or not join:
            found = function(*args)
        else:
            with joined():
                found = function(*args)
        # Plain pickle: that of torch shares memory, which goes with this process.
        pipe.send_bytes(pickle.dumps((True, found)))
    except BaseException as error:
        shown = traceback.format_exc()
        pipe.send_bytes(pickle.dumps((False, (type(error).__name__, str(error), shown))))
    pipe.close()


class Ranks:
    """Processes at work; results() waits for them. join=False: the function joins, or not."""

    def __init__(
        self,
        world: int,
        function: Callable[..., Any],
        *args: Any,
        join: bool = True,
        **variables: str,
    ) -> None:
        port, self.pipes, self.processes = free_port(), [], []
        for rank in range(world):
            here, there = _context.Pipe(duplex=False)
            told = environment(world, rank, port) | variables
            made = _context.Process(
                target=_work, args=(told, function, args, join, there), daemon=True
            )
            made.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(made)

    def ends(self, timeout: float = 120) -> list[tuple[bool, Any]]:
        """(whether it returned, what) or (False, (kind of error, sentence, traceback)) by rank;
        (False, ("gone", exit code, "")) of one that was killed.
        """
        found: list[tuple[bool, Any]] = []
        try:
            for pipe, process in zip(self.pipes, self.processes, strict=True):
                if not pipe.poll(timeout):
                    pytest.fail(f"rank {len(found)} is still at work after {timeout} s: {found}")
                try:
                    found.append(pickle.loads(pipe.recv_bytes()))
                except EOFError:
                    process.join(10)
                    found.append((False, ("gone", process.exitcode, "")))
        finally:
            for process in self.processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
        return found

    def results(self, timeout: float = 120) -> list[Any]:
        """What the ranks returned; the test fails where one of them raised."""
        ends = self.ends(timeout)
        for rank, (good, what) in enumerate(ends):
            if not good:
                pytest.fail(f"rank {rank}: {what[2] or what}")
        return [what for _, what in ends]


def run_ranks(world: int, function: Callable[..., Any], *args: Any, **variables: str) -> list[Any]:
    """function(*args) in `world` processes of one team (1: without one); what each returned. The
    function is one of a module, and what it takes and returns is pickled.
    """
    return Ranks(world, function, *args, **variables).results()
