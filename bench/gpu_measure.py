"""One section of bench/gpu.py, in a process of its own: a crash on the GPU ends only that section.

    python bench/gpu_measure.py SECTION --device cuda --until EPOCH --into FILE [--quick]

Every finished row is appended to FILE as one JSON line, so that what was measured before a crash
or a timeout is kept. `until` (seconds since 1970) is when the section's budget ends: each case may
use its share of what is left, makes fewer repeats when that is short, and at least one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
# Appended, not inserted: an installed distaya_ext must win over the source folder.
sys.path.append(str(ROOT))

if TYPE_CHECKING:
    from bench.gpu_clock import Clock

TURNS, RULER_EVERY = 15, 3  # ours in every turn, the rulers in every third


def summary(times: list[float]) -> dict[str, float]:
    median = statistics.median(times)
    return {"median": median, "least": min(times), "most": max(times), "runs": len(times)}


def measure(name: str, case, clock: Clock, until: float, turns: int = TURNS) -> dict:
    """One row. Times ours and the rulers in turn until `turns` or the time is over.

    A ruler that fails is named in the row's error and left out; ours is measured all the same.
    """
    first = next(iter(case.rulers))
    result = case.ours(*case.inputs[0])  # the checked call is the first warm-up, too
    calls, errors, difference = {"ours": case.ours}, [], None
    for who, call in case.rulers.items():
        try:
            other = call(*case.inputs[0])
            calls[who] = call
            if who == first:
                difference = case.difference(result, other)
            del other
        except Exception as error:
            errors.append(f"{who}: {sentence(error)}")
    del result
    if difference is None or not difference <= case.limit:  # a NaN, too
        seen = "could not be compared with" if difference is None else f"is {difference:.1e} off"
        errors.insert(0, f"ours {seen} {first}; at most {case.limit:.0e} is right")
    timers, notes = clocked(calls, case, clock)
    times, made = timed(timers, until, turns)
    row = {
        "name": name,
        "ours": summary(times.pop("ours")),
        "rulers": {who: summary(seconds) for who, seconds in times.items()},
        "work": case.work,
        "difference": difference if difference is not None and isfinite(difference) else None,
        "limit": case.limit,
        "of": case.of,
    }
    if made < turns:
        notes.append(f"{made} of {turns} repeats, then its share of the time was spent")
    if notes:
        row["note"] = "; ".join(notes)
    if errors:
        row["error"] = "; ".join(errors)
    return row


Timers = dict[str, Callable[[int], float]]


def clocked(calls: dict[str, Callable], case, clock: Clock) -> tuple[Timers, list[str]]:
    """What times one call of each contender, and who could not be captured into a graph."""
    timers: Timers = {}
    notes = []
    for who, call in calls.items():
        timers[who] = clock.each(call, case.inputs)
        if case.graph and clock.cuda:
            try:
                timers[who] = clock.graph(call, case.inputs)
            except Exception as error:
                notes.append(f"{who} timed call by call, no graph of it: {sentence(error)}")
    return timers, notes


def timed(timers: Timers, until: float, turns: int) -> tuple[dict[str, list[float]], int]:
    """Seconds per contender, and how many of the turns the time allowed: at least one."""
    if time.time() < until:  # the second warm-up
        for seconds in timers.values():
            seconds(-1)
    times: dict[str, list[float]] = {who: [] for who in timers}
    made = 0
    while made < turns and (made == 0 or time.time() < until):
        for who, seconds in timers.items():
            if who == "ours" or made % RULER_EVERY == 0:
                times[who].append(seconds(made))
        made += 1
    return times, made


def sentence(error: BaseException) -> str:
    """An exception as one line that holds no path of this machine."""
    text = " ".join(str(error).split()) or "no message"
    for path, name in ((str(ROOT), "."), (sys.prefix, "(python)"), (str(Path.home()), "~")):
        text = text.replace(path, name)
    return f"{type(error).__name__}: {text[:300]}"


class Lost(Exception):
    """A kernel took the device with it: this process can use it no more. told: rows so far."""

    def __init__(self, told: int, name: str):
        super().__init__(f"the device was lost in {name}")
        self.told, self.name = told, name


def measure_all(
    table: dict[str, Callable], clock: Clock, until: float, tell: Callable, first: int = 0
) -> bool:
    """Every case of a section from the first-th on, whatever happens to the others; True when all
    went well. Raises Lost behind the row that lost the device."""
    good = True
    for done, (name, build) in enumerate(table.items()):
        if done < first:
            continue
        share = max(0.0, until - time.time()) / (len(table) - done)
        mine = time.time() + share
        try:
            row = measure(name, build(), clock, mine)
        except Exception as error:
            row = {"name": name, "error": sentence(error)}
        good &= "error" not in row
        tell({"row": row})
        if clock.cuda:
            import torch

            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise Lost(done + 1, name) from error
            torch.cuda.empty_cache()
    return good


def going_on(lost: Lost, argv: list[str]) -> list[str]:
    """The arguments with which another process measures the rows behind the one that lost the
    device: where that was a product for many tokens, without warpgroup products."""
    tokens = re.search(r", (\d+)$", lost.name)
    blamed = argv[0] == "sqgemm" and tokens and int(tokens[1]) >= 64
    plain = [] if "--no-wgmma" in argv or not blamed else ["--no-wgmma"]
    return [*argv, *plain, "--first", str(lost.told)]  # of several --first the last one counts


def facts(device: str, quick: bool) -> dict:
    """What the figures hold for; "refusal" says in a sentence why none can be had."""
    import torch

    import distaya_ext
    from bench import harness
    from distaya_ext.ops import machine

    status = machine.cuda_status()
    here = Path(distaya_ext.__file__).resolve().parent.parent
    known = {
        "torch": torch.__version__,
        "archs": machine.cuda_archs(),
        "cuda": status,
        "package": "source tree" if here == ROOT else "installed",
        "smoke": quick or device == "cpu",
    }
    if device == "cpu":
        return known | {"device": harness.machine()["cpu"], "isa": machine.isa()}
    if not machine.has_cuda():
        refusal = "this distaya_ext was built without CUDA kernels; --build makes them"
        return known | {"refusal": refusal}
    if status["status"] != "ok":
        return known | {"refusal": f"the kernels cannot use the GPU: {status['status']}"}
    major, minor = torch.cuda.get_device_capability(0)
    return known | {
        "device": torch.cuda.get_device_name(0),
        "capability": f"{major}.{minor}",
        "torch_cuda": torch.version.cuda,
    }


def run(args: argparse.Namespace, tell: Callable) -> bool:
    """Measure a section; True when all went well."""
    section, device, quick = args.section, args.device, args.quick
    if section == "facts":
        tell({"facts": facts(device, quick)})
        return True
    import torch

    from bench import gpu_case, gpu_cases
    from bench.gpu_clock import Clock, ceilings

    if device == "cuda":
        torch.backends.cuda.preferred_linalg_library("cusolver")  # the one to be measured against
    torch.set_float32_matmul_precision("highest")  # fp32 means fp32, not tf32
    torch.manual_seed(0)
    clock = Clock(device)
    if section == "ceilings":
        tell({"ceilings": ceilings(clock, device, quick)})
        return True
    table = gpu_cases.cases(section, gpu_case.size(quick, device))
    with torch.no_grad(), contextlib.ExitStack() as without:
        if args.no_wgmma:
            from distaya_ext.ops import sqgemm

            without.enter_context(sqgemm.force_wgmma(False))
        return measure_all(table, clock, args.until, tell, args.first)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("section")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0, help="rows that an earlier process told")
    parser.add_argument("--no-wgmma", action="store_true", help="they lost the device before")
    args = parser.parse_args()

    def tell(record: dict) -> None:
        if args.no_wgmma and "row" in record:
            notes = (record["row"].get("note"), "without warpgroup products")
            record["row"]["note"] = "; ".join(filter(None, notes))
        with args.into.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        row = record.get("row", {})
        if row:
            told = f"{row['ours']['median'] * 1e3:10.3f} ms  " if "ours" in row else ""
            print(f"  {row['name']:32} {told}{row.get('error', '')}", flush=True)

    try:
        return 0 if run(args, tell) and not args.first else 1
    except Lost as lost:
        print(f"  {lost}; going on in another process", flush=True)
        subprocess.run([sys.executable, __file__, *going_on(lost, sys.argv[1:])], check=False)
        return 1
    except Exception as error:
        tell({"error": sentence(error)})
        return 1


if __name__ == "__main__":
    sys.exit(main())
