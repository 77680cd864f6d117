"""A run of several processes that was killed goes on with any number of them, to the same bytes."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
from ranked import Ranks, run_ranks
from test_compress_ranks import run, weights

from distaya_ext.compress import events, keep, kept
from distaya_ext.ranks import team

FIELDS: dict[str, Any] = {"nm": "2:4", "bits": 4, "group": 32, "quality": "high"}


def killed(source: Path, out: Path, victim: int, layer: int, when: str) -> None:
    """Have rank `victim` be killed around the keeping of a layer."""
    holder = keep.Keeper if victim == 0 else kept.Follower
    real = holder.save

    def save(self: Any, at: int) -> None:
        if at == layer and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, at)
        if at == layer and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)

    keep.SHARE = 1e9  # every layer is kept, however long that takes
    if team().rank == victim:
        holder.save = save
    run(source, out, FIELDS, None)


def resumed(source: Path, out: Path, parts: int | None = None) -> list[int]:
    """How many layers were found done, of one run."""
    told: list[Any] = []
    run(source, out, FIELDS, parts, on_event=told.append)
    return [event.done for event in told if isinstance(event, events.Resumed)]


@pytest.mark.parametrize(
    ("victim", "layer", "when", "world"),
    [(1, 0, "after", 2), (0, 1, "after", 1), (1, 1, "before", 3), (0, 0, "before", 2)],
)
def test_goes_on_with_another_number_of_ranks(
    victim: int, layer: int, when: str, world: int, tmp_path: Path
) -> None:
    source = tiny.make(tmp_path / "model", tiny.FAMILIES["llama"])
    run_ranks(1, run, source, tmp_path / "whole", FIELDS, 2)
    out = tmp_path / "out"
    ends = Ranks(2, killed, source, out, victim, layer, when).ends()
    assert ends[victim][1][0] == "gone" and ends[victim][1][1] == -signal.SIGKILL
    assert not ends[1 - victim][0] and not out.exists()
    found = run_ranks(world, resumed, source, out)
    done = layer + 1 if when == "after" else layer
    # What rank 1 has just sent may be lost with it.
    least = done - 1 if victim == 1 and when == "after" else done
    assert sum(found[0]) in range(least, done + 1) and not any(found[1:])
    assert weights(out) == weights(tmp_path / "whole")
    assert not (tmp_path / ".out.compress").exists()
