"""What ranks tell each other beside their collectives, in the store that torchrun keeps for them.

Keys, all below distaya/<attempt of torchrun>/:

hello/R   who rank R is and what it is made of; see greeting.py
beat/R    the sign of life of rank R: how often it was given, and how many collectives it has begun
failure   the first failure of the run; whoever else fails finds it there
left/R    rank R has ended its command and needs nothing from here any more
word      the rank that tells the user
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..errors import LostError

_STEP = 0.1  # seconds between two attempts


@dataclass(frozen=True)
class Failure:
    """Why a run ends. rank: whose failure it is; kind: error (it raised one), stopped (it was told
    to), lost (it is gone or does not answer; then another rank has noted this); code: exit code.
    """

    rank: int
    host: str
    kind: str
    sentence: str
    code: int


class Board:
    """One connection to the store; a process has one per thread, since a call may block.

    RuntimeError of torch's where the store is gone. host=True: this process keeps the store.
    """

    def __init__(self, rank: int, world: int, patience: float, host: bool = False):
        self.rank, self.world, self.patience = rank, world, patience
        self.hosts = host
        self.where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if not host:
            _reach(self.where, patience, rank, world)
        self._client = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            None,
            host,
            timedelta(seconds=patience),
            wait_for_workers=False,
            multi_tenant=True,
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._prefix = f"distaya/{attempt}"
        self._store = dist.PrefixStore(self._prefix, self._client)

    def again(self) -> Board:
        """A second connection."""
        return Board(self.rank, self.world, self.patience)

    def group_store(self) -> Any:
        """What the process group is made with."""
        return dist.PrefixStore(f"{self._prefix}/group", self._client)

    # ---- coming ----

    def greet(self, record: dict[str, Any]) -> None:
        self._store.set(f"beat/{self.rank}", "0 0")
        self._store.set(f"hello/{self.rank}", json.dumps(record))

    def complete(self) -> bool:
        """Whether all ranks have greeted."""
        return self._store.check([f"hello/{r}" for r in range(self.world)])

    def missing(self) -> list[int]:
        """Ranks that have not greeted."""
        return [r for r in range(self.world) if not self._store.check([f"hello/{r}"])]

    def records(self) -> list[dict[str, Any]]:
        """The greetings; all ranks have greeted."""
        return [json.loads(r) for r in self._all("hello")]

    # ---- being there ----

    def beat(self, count: int, begun: int) -> None:
        self._store.set(f"beat/{self.rank}", f"{count} {begun}")

    def beats(self) -> list[tuple[int, int]]:
        """(signs of life, collectives begun) by rank."""
        found = []
        for told in self._all("beat"):
            count, begun = told.split()
            found.append((int(count), int(begun)))
        return found

    # ---- ending ----

    def publish(self, failure: Failure) -> Failure:
        """The first failure that was published, which is this one unless another rank was first."""
        return _read(self._store.compare_set("failure", "", json.dumps(asdict(failure))))

    def failure(self) -> Failure | None:
        if not self._store.check(["failure"]):
            return None
        return _read(self._store.get("failure"))

    def leave(self) -> None:
        self._store.set(f"left/{self.rank}", "yes")

    def left(self, rank: int) -> bool:
        return self._store.check([f"left/{rank}"])

    def take_word(self) -> bool:
        """Whether this rank is the one that tells the user."""
        return self._store.compare_set("word", "", str(self.rank)) == str(self.rank).encode()

    def word_taken(self) -> bool:
        return self._store.check(["word"])

    def _all(self, name: str) -> list[str]:
        found = self._store.multi_get([f"{name}/{r}" for r in range(self.world)])
        return [value.decode() for value in found]


def _read(told: bytes) -> Failure:
    return Failure(**json.loads(told))


def _reach(where: str, patience: float, rank: int, world: int) -> None:
    """Wait until somebody listens there; LostError after so many seconds."""
    host, _, port = where.rpartition(":")
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LostError(
                    f"rank {rank} of {world} has not reached rank 0 at {where} within "
                    f"{patience:g} s: {error.strerror or error}"
                ) from None
        time.sleep(_STEP)
