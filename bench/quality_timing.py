"""Seconds of compress() with rows of ours in turns, so that a drifting machine favours none."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench import harness
from bench import quality_ours as ours
from bench.plain import Drawn
from bench.quality_rows import PATTERNS, Row
from bench.quality_store import Store


def add(
    store: Store,
    rows: list[Row],
    drawn: Drawn,
    options: ours.Options,
    args: argparse.Namespace,
    say: Callable[[str], None],
) -> None:
    """Time the sweeping rows of ours, pattern by pattern, and keep every round in the store.

    A round runs each row of a pattern once; every other round goes backwards. Searches are not
    timed: they are run once for a model, not beside the others.
    """
    found: dict[str, list[float]] = {}
    for pattern in PATTERNS.values():
        here = [r for r in rows if r.pattern == pattern and r.side == "ours" and r.kind != "search"]
        if len(here) < 2:
            continue
        seconds: dict[str, list[float]] = {row.key: [] for row in here}
        for turn in range(args.timing):
            for row in here if turn % 2 == 0 else reversed(here):
                with tempfile.TemporaryDirectory() as folder:
                    spent, _ = ours.compress_once(row, drawn, options, Path(folder) / "out")
                seconds[row.key].append(round(spent, 4))
        for key, each in seconds.items():
            say(f"{key:28} median {statistics.median(each):.2f} s of {len(each)}")
        found |= seconds
    if not found:
        say("nothing to time: no pattern has two rows of ours that this build can make")
        return
    store.timing = {
        "rounds": args.timing,
        "threads": args.threads,
        "machine": harness.machine(),
        "rows": {**store.timing.get("rows", {}), **found},
    }
    store.save()
