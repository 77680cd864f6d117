"""What the benches share: quiet threads, saved numbers, tables that write themselves.

The clock itself is distaya_ext/measure/clock.py, since `distaya bench` measures with it too. It is
loaded as a file: the rulers must run where the extension is not built, and passive() before torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

_FILE = Path(__file__).resolve().parent.parent / "distaya_ext" / "measure" / "clock.py"


def _load():
    spec = importlib.util.spec_from_file_location("bench._clock", _FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


clock = sys.modules.get("distaya_ext.measure.clock") or _load()
Contender, Sample, Timing = clock.Contender, clock.Sample, clock.Timing
compare, sample, summary = clock.compare, clock.sample, clock.summary
machine, queue_seconds, seconds = clock.machine, clock.queue_seconds, clock.seconds


def passive() -> None:
    """Start this script again with OMP_WAIT_POLICY=passive unless a policy is set already.

    OpenMP threads that spin while they wait turn a busy neighbour into a tenfold slowdown. The
    variable is read when the OpenMP runtime loads.
    """
    if os.environ.get("OMP_WAIT_POLICY"):
        return
    if "torch" in sys.modules:
        raise RuntimeError("harness.passive() must be called before torch is imported")
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.execv(sys.executable, [sys.executable, *sys.argv])


def save(path: Path, rows: Sequence, **more) -> None:
    """JSON of dataclass rows with the machine they were measured on."""
    body = {"machine": machine(), **more, "rows": [asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def add_sources(parser: argparse.ArgumentParser, learnt: str) -> None:
    """--model, the texts that something is learnt from (--train, --calibration) and --test: what
    the package ships unless others are given.
    """
    assets = _FILE.parent.parent / "assets"
    parser.add_argument("--model", type=Path, default=assets / "nano-aya")
    parser.add_argument(learnt, type=Path, default=assets / "texts" / "calibration")
    parser.add_argument("--test", type=Path, default=assets / "texts" / "evaluation")


def write_table(path: Path, name: str, text: str) -> None:
    """Replace what stands between <!-- bench:NAME --> and <!-- /bench:NAME --> in a file."""
    start, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    body = path.read_text(encoding="utf-8")
    if body.count(start) != 1 or body.count(end) != 1 or body.index(start) > body.index(end):
        raise ValueError(f"{path.name} needs exactly one {start} ... {end} pair, in this order")
    before, rest = body.split(start)
    _, after = rest.split(end)
    path.write_text(f"{before}{start}\n{text.strip()}\n{end}{after}", encoding="utf-8")
