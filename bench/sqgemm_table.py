"""Packed products and a packed layer beside torch, at the shapes and bars of the Aya models.

    python bench/sqgemm_table.py [--threads 1,2] [--readme] [--smoke] [--json FILE]

Every number of the table comes from one run: rulers and ours alternate, weights come from memory,
the limits of the machine are measured at the beginning. --smoke uses small shapes (a test of this
script, never written to README).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from bench import harness  # noqa: E402

if __name__ == "__main__":
    harness.passive()

import os  # noqa: E402

import torch  # noqa: E402

from distaya_ext.measure import kernels, layer, limits, report, shapes  # noqa: E402
from distaya_ext.measure.kernels import Plan, Result, Row  # noqa: E402
from distaya_ext.measure.layer import LayerRow  # noqa: E402
from distaya_ext.ops import pack  # noqa: E402

MAIN = ("aya-8b gate/up", "aya-8b down")
FEW = ("torch bf16", "torch int4", "int4", "int4-2:4", "int4-mask", "int4 exact")
COLUMNS = ("torch bf16", "torch int4", "int4", "int4-2:4", "int4-mask", "int4-out", "int3", "int8")
LAYER_KINDS = ("int4", "int4-2:4", "int4-mask")


@dataclass(frozen=True)
class Bar:
    """What must be reached: `got` at least `wanted` times something, at 2 threads."""

    text: str
    got: float
    wanted: float
    why: str

    @property
    def met(self) -> bool:
        return self.got >= self.wanted

    def __str__(self) -> str:
        verdict = "met" if self.met else f"NOT MET: {self.why}"
        return f"{self.text}: {self.got:.2f}, wanted {self.wanted:g}, {verdict}"


def plans(threads: Sequence[int], smoke: bool) -> list[Plan]:
    """What is measured: everything on the two large matrices up to 128 tokens, the rest by need."""
    if smoke:
        found = shapes.find(["256x512"])
        return [Plan(found, pack.KINDS, [1, 16, 128], threads, streamed=1 << 18)]
    both = shapes.find(list(MAIN))
    rest = shapes.find(["aya-8b q/o", "aya-8b k/v", "aya-8b qkv", "tiny-aya down", "aya-32b down"])
    head = shapes.find(["aya-8b head"])
    return [
        Plan(both, pack.KINDS, [1, 2, 4, 8, 16, 32, 64, 128], threads),
        Plan(both, ["int4", "int4-2:4", "int4-mask"], [512, 2048], threads, names=FEW),
        Plan(rest, ["int4", "int4-2:4", "int4-mask"], [1, 16, 128], threads, names=FEW),
        Plan(head, ["int8"], [1, 16], threads),
    ]


def bars(rows: Sequence[Row], layers: Sequence[LayerRow], threads: int = 2) -> list[Bar]:
    """The bars that these rows can be held against."""
    by = {(r.shape, r.tokens, r.name): r for r in rows if r.threads == threads}
    found: list[Bar] = []
    for shape in dict.fromkeys(r.shape for r in rows if r.shape in MAIN):
        for tokens, ruler, wanted in (
            (1, "torch int4", 1.5),
            (16, "torch int4", 3.0),
            (128, "torch int4", 4.0),
            (128, "torch bf16", 1.5),
        ):
            ours, other = by.get((shape, tokens, "int4")), by.get((shape, tokens, ruler))
            if ours and other:
                plural = "s" * (tokens > 1)
                text = f"{shape}, {tokens} token{plural}, int4 times {ruler}"
                found.append(Bar(text, ours.ratios[ruler], wanted, _why(ours, other)))
        ours = by.get((shape, 1, "int4"))
        if ours is None:
            continue
        text = f"{shape}, 1 token, int4, share of the read bandwidth measured in turns with it"
        found.append(Bar(text, ours.gbs / ours.read, 0.8, report.share(ours)))
        for kind in ("int4-2:4", "int4-mask"):
            sparse = by.get((shape, 1, kind))
            if sparse is None:
                continue
            text = f"{shape}, 1 token, {kind} times int4"
            found.append(Bar(text, ours.seconds / sparse.seconds, 0.95, report.limit(sparse)))
            text = f"{shape}, predicted over true bytes of {kind}"
            predicted = pack.Format(kind, sparse.rows, sparse.cols).expected_bytes()
            found.append(Bar(text, predicted / sparse.nbytes, 0.99, f"{sparse.nbytes} bytes"))
    for row in layers:
        if row.threads == threads and row.name != "dense bf16":
            text = f"{row.model} layer, decode, {row.name} times dense bf16"
            found.append(Bar(text, row.times_dense, 3.0, f"{row.gbs:.1f} GB/s"))
    return found


def _why(ours: Row, ruler: Row) -> str:
    """What the machine allows, where a bar is missed."""
    if ours.read is None:
        return f"ours {report.limit(ours)}, the ruler {report.limit(ruler)}"
    possible = ruler.seconds * ours.read * 1e9 / ours.nbytes
    return (
        f"ours reads {report.share(ours)}, the ruler {report.share(ruler)}; at the speed of that "
        f"plain read ours would be {possible:.2f} times the ruler"
    )


def text(result: Result, layers: Sequence[LayerRow]) -> str:
    """What stands in README."""
    policy = os.environ.get("OMP_WAIT_POLICY", "the default")
    lines = [report.markdown(result.rows, COLUMNS)]
    lines += [
        "Decode of one Aya-8B-shaped layer (128 tokens in the cache, weights from memory):",
        "",
    ]
    lines += ["| threads | weights | MiB | tokens/s | x dense bf16 |", "|--:|---|--:|--:|--:|"]
    for r in layers:
        mark = " (contended)" if r.contended else ""
        rate = f"{r.tokens_per_second:.0f}{mark}"
        lines.append(
            f"| {r.threads} | {r.name} | {r.nbytes / 2**20:.0f} | {rate} | {r.times_dense:.2f} |"
        )
    lines += ["", f"{harness.machine()['cpu']}, medians, OMP_WAIT_POLICY={policy}."]
    lines += [f"Limits, {limits.describe(x)}." for x in result.limits]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--readme", action="store_true", help="rewrite the table in README.md")
    parser.add_argument("--smoke", action="store_true", help="small shapes, a test of the script")
    parser.add_argument("--json", type=Path, help="default: bench/results/sqgemm.json")
    args = parser.parse_args()
    start = time.perf_counter()
    threads = [int(part) for part in args.threads.split(",")]

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {line}", flush=True)

    path = args.json or (None if args.smoke else ROOT / "bench" / "results" / "sqgemm.json")
    cpu = torch.device("cpu")
    machine = limits.Machine(cpu)
    whole = Result()
    for plan in plans(threads, args.smoke):
        part = kernels.measure(plan, machine=machine, on_note=say, on_row=lambda r: say(tell(r)))
        whole.rows += part.rows
        whole.notes += part.notes
        whole.limits = part.limits
        save(path, whole, [], [])  # a run that is stopped keeps what it measured
    whole.rows = kernels.limited(whole.rows, whole.limits)
    sizes = shapes.Model(256, 512, 4, 2, 8) if args.smoke else None
    streamed = 1 << 18 if args.smoke else None
    layers = layer.measure("aya-8b", LAYER_KINDS, threads, streamed, sizes=sizes)
    for line in report.layer_lines(layers):
        say(line)
    verdicts = bars(whole.rows, layers)
    for bar in verdicts:
        print(bar)
    print(text(whole, layers))
    save(path, whole, layers, verdicts)
    if args.readme and not args.smoke:
        write_readme(whole, layers)


def save(
    path: Path | None, result: Result, layers: Sequence[LayerRow], verdicts: Sequence[Bar]
) -> None:
    """Everything that was measured as JSON."""
    if path is None:
        return
    more = {
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "layers": [asdict(row) for row in layers],
        "bars": [asdict(bar) | {"met": bar.met} for bar in verdicts],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    body = report.kernels_json(result, **more)
    path.write_text(_one_row_a_line(body), encoding="utf-8")


def _one_row_a_line(body: dict) -> str:
    """JSON with a line for every row, so that two runs can be compared line by line."""

    def short(value):
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, dict):
            return {key: short(inner) for key, inner in value.items()}
        return [short(inner) for inner in value] if isinstance(value, list) else value

    parts = []
    for key, value in short(body).items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n " + ",\n ".join(json.dumps(row) for row in value) + "\n]"
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write_readme(result: Result, layers: Sequence[LayerRow]) -> None:
    """Unless a row is contended."""
    spoilt = [f"{r.shape} {r.tokens} {r.name}" for r in result.contended]
    spoilt += [f"layer {r.name}" for r in layers if r.contended]
    if spoilt:
        raise SystemExit(f"README.md left alone, contended rows: {'; '.join(spoilt)}")
    harness.write_table(ROOT / "README.md", "sqgemm", text(result, layers))


def tell(row: Row) -> str:
    ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row.ratios.items())
    return (
        f"{row.threads}t {row.shape} m{row.tokens} {row.name}: {report.milliseconds(row.seconds)} "
        f"ms, {report.limit(row)}, {ratios}{' CONTENDED' if row.contended else ''}"
    )


if __name__ == "__main__":
    main()
