"""What it costs to keep every layer, and what going on saves.

    python bench/resume.py [--rounds 5] [--tokens 16384] [--quality default]

The bundled model is compressed again and again, in turns: keeping layers as ever, keeping them
without waiting for the disk (no fsync), and keeping none. Then a run is stopped behind half of its
layers and gone on with. Medians of the turns, and of their ratios round by round; a busy machine
shows in their range.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from unittest import mock

import torch

from distaya_ext.compress import compress, events, keep
from distaya_ext.recipe import Recipe

ASSETS = Path(str(files("distaya_ext"))) / "assets"


@contextmanager
def never_kept():
    with mock.patch.object(keep.Keeper, "due", lambda self, layer: False):
        yield


@contextmanager
def without_fsync():
    with mock.patch.object(os, "fsync", lambda handle: None):
        yield


@contextmanager
def as_ever():
    yield


WAYS = {"kept": as_ever, "kept, no fsync": without_fsync, "not kept": never_kept}


def once(recipe: Recipe, out: Path, on_event=None) -> tuple[float, float, int]:
    """Seconds of a run, those of the processor, and the bytes that it kept over all layers."""
    kept, put = [0], keep.Work.keep

    def counted(self, name, write):
        found = put(self, name, write)
        kept[0] += 0 if name.startswith("part-") else found["size"]
        return found

    start, busy = time.perf_counter(), time.process_time()
    with mock.patch.object(keep.Work, "keep", counted):
        compress(recipe.model, out, recipe, on_event=on_event)
    return time.perf_counter() - start, time.process_time() - busy, kept[0]


def resumed(recipe: Recipe, folder: Path) -> tuple[float, int, int]:
    """Seconds of a run that goes on behind half of the layers; kept layers, layers."""
    told = []

    def stop(event):
        if isinstance(event, events.LayerDone) and event.layer == event.layers // 2:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        once(recipe, folder / "half", stop)
    seconds, _, _ = once(recipe, folder / "half", told.append)
    (event,) = [e for e in told if isinstance(e, events.Resumed)]
    return seconds, event.done, event.layers


def ratios(seconds: dict[str, list[float]], way: str) -> str:
    """The median, least and greatest ratio to a run of the same round that keeps nothing."""
    found = [a / b for a, b in zip(seconds[way], seconds["not kept"], strict=True)]
    return f"x {statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--quality", default="default", choices=["plain", "default", "high"])
    parser.add_argument("--folder", type=Path, help="where the runs write (default: temporary)")
    given = parser.parse_args()
    recipe = Recipe(
        model=str(ASSETS / "nano-aya"), method="sparsegpt", nm="2:4", bits=4, quality=given.quality,
        calibration={"path": str(ASSETS / "texts" / "calibration"), "tokens": given.tokens},
    )  # fmt: skip
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    busy: dict[str, list[float]] = {way: [] for way in WAYS}
    kept: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        once(recipe, folder / "warm")
        for number in range(given.rounds):
            order = list(WAYS) if number % 2 == 0 else list(WAYS)[::-1]
            for way in order:
                with WAYS[way]():
                    took, worked, kept[way] = once(recipe, folder / "out")
                shutil.rmtree(folder / "out")
                seconds[way].append(took)
                busy[way].append(worked)
        going = resumed(recipe, folder)
    print(
        f"nano-aya, {given.tokens} tokens, 2:4 + int4, quality {given.quality}, "
        f"{torch.get_num_threads()} threads, {given.rounds} rounds in turns"
    )
    for way in WAYS:
        print(
            f"{way:<15} {statistics.median(seconds[way]):6.2f} s {ratios(seconds, way)}, of the "
            f"processor {ratios(busy, way)}; {kept[way] / 1e6:.1f} MB kept in all"
        )
    print(f"going on behind {going[1]} of {going[2]} layers: {going[0]:.2f} s")


if __name__ == "__main__":
    main()
