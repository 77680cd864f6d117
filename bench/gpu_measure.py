"""One section of bench/gpu.py, in a process of its own: a crash on the GPU ends only that section.

    python bench/gpu_measure.py SECTION --device cuda --until EPOCH --into FILE [--quick]

Every finished row is appended to FILE as one JSON line, so that what was measured before a crash
or a timeout is kept. `until` (seconds since 1970) is when the section's budget ends: each case may
use its share of what is left, makes fewer repeats when that is short, and at least one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Appended, not inserted: an installed distaya_ext must win over the source folder.
sys.path.append(str(ROOT))

TURNS, RULER_EVERY = 15, 3  # ours in every turn, the rulers in every third


class Clock:
    """Seconds of one call: CUDA events on a GPU, the wall clock on the CPU (smoke tests).

    Before a GPU call a large buffer is filled: that empties the cache and keeps the device busy
    while Python queues the call, so that the events do not measure Python.
    """

    def __init__(self, device: str):
        import torch

        self.cuda = device == "cuda"
        if self.cuda:
            cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
            self.filler = torch.empty(max(512 << 20, 4 * cache), dtype=torch.uint8, device="cuda")
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

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


def summary(times: list[float]) -> dict[str, float]:
    median = statistics.median(times)
    return {"median": median, "least": min(times), "most": max(times), "runs": len(times)}


def measure(name: str, case, clock: Clock, until: float, turns: int = TURNS) -> dict:
    """One row. Times ours and the rulers in turn until `turns` or the time is over."""
    calls = {"ours": case.ours, **case.rulers}
    first = next(iter(case.rulers))
    results = {who: call(*case.inputs[0]) for who, call in calls.items()}  # a warm-up, too
    difference = case.difference(results["ours"], results[first])
    results.clear()
    times: dict[str, list[float]] = {who: [] for who in calls}
    if time.time() < until:
        for call in calls.values():
            clock.seconds(call, case.inputs[-1])
    made = 0
    while made < turns and (made == 0 or time.time() < until):
        arguments = case.inputs[made % len(case.inputs)]
        for who, call in calls.items():
            if who == "ours" or made % RULER_EVERY == 0:
                times[who].append(clock.seconds(call, arguments))
        made += 1
    row = {
        "name": name,
        "ours": summary(times["ours"]),
        "rulers": {who: summary(times[who]) for who in case.rulers},
        "work": case.work,
        "difference": difference,
        "limit": case.limit,
    }
    if made < turns:
        row["note"] = f"{made} of {turns} repeats, then its share of the time was spent"
    if not difference <= case.limit:  # a NaN, too
        row["error"] = f"differs from {first} by {difference:.1e}, more than {case.limit:.0e}"
    return row


def sentence(error: BaseException) -> str:
    """An exception as one line that holds no path of this machine."""
    text = " ".join(str(error).split()) or "no message"
    for path, name in ((str(ROOT), "."), (sys.prefix, "(python)"), (str(Path.home()), "~")):
        text = text.replace(path, name)
    return f"{type(error).__name__}: {text[:300]}"


def measure_all(table: dict[str, Callable], clock: Clock, until: float, tell: Callable) -> bool:
    """Every case of a section, whatever happens to the others; True when all went well."""
    good = True
    for done, (name, build) in enumerate(table.items()):
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

            torch.cuda.empty_cache()
    return good


def facts(device: str, quick: bool) -> dict:
    """What the figures hold for; "refusal" says in a sentence why none can be had."""
    import torch

    import distaya_ext
    from bench import harness
    from distaya_ext.ops import machine

    status = machine.cuda_status()
    known = {
        "torch": torch.__version__,
        "archs": machine.cuda_archs(),
        "cuda": status,
        "package": "source tree" if ROOT in Path(distaya_ext.__file__).parents else "installed",
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


def run(section: str, device: str, quick: bool, until: float, tell: Callable) -> bool:
    if section == "facts":
        tell({"facts": facts(device, quick)})
        return True
    import torch

    from bench import gpu_case, gpu_cases

    torch.set_float32_matmul_precision("highest")  # fp32 means fp32, not tf32
    torch.manual_seed(0)
    clock = Clock(device)
    if section == "ceilings":
        tell({"ceilings": ceilings(clock, device, quick)})
        return True
    table = gpu_cases.cases(section, gpu_case.size(quick, device))
    with torch.no_grad():
        return measure_all(table, clock, until, tell)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("section")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--into", type=Path, required=True)
    args = parser.parse_args()

    def tell(record: dict) -> None:
        with args.into.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        row = record.get("row", {})
        if row:
            end = row.get("error") or f"{row['ours']['median'] * 1e3:.3f} ms"
            print(f"  {row['name']:36} {end}", flush=True)

    try:
        return 0 if run(args.section, args.device, args.quick, args.until, tell) else 1
    except Exception as error:
        tell({"error": sentence(error)})
        return 1


if __name__ == "__main__":
    sys.exit(main())
