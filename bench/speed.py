"""Seconds of every compression step: textbook PyTorch, tuned PyTorch, ours, in one run.

    python bench/speed.py [ROW ...] [--threads 1,2] [--quick] [--readme] [--rulers-only]

ROW filters by parts of row names (--list shows them); rows measured earlier stay in the JSON file
and in the table until they are measured again. --quick uses small shapes (a smoke test, never
written to README). Beside ours stands the rate the machine's own peaks would allow for the same
work: GFLOP counted once and without waste, bf16 work at the bf16 peak, the rest at the fp32 one.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from bench import harness  # noqa: E402

if __name__ == "__main__":
    harness.passive()


from bench import ceilings  # noqa: E402
from bench.cases import Case, cases  # noqa: E402
from bench.harness import Timing, seconds  # noqa: E402


@dataclass(frozen=True)
class Row:
    name: str
    threads: int
    quick: bool
    textbook: Timing
    tuned: Timing | None
    ours: Timing | None
    gflop: float
    ceiling: float  # GFLOP/s the peaks allow for this mix of work
    bars: tuple[float, float]
    agreement: str

    @property
    def timings(self) -> list[Timing]:
        return [t for t in (self.textbook, self.tuned, self.ours) if t]

    @property
    def trusted(self) -> bool:
        return all(t.trusted for t in self.timings)


def measure(name: str, case: Case, peak: ceilings.Ceilings, quick: bool) -> Row:
    results: dict[str, list] = {}
    times = harness.compare(case.contenders, peak.threads, results=results)
    bound = case.fp32 / peak.fp32 + case.bf16 / peak.bf16
    gflop = case.fp32 + case.bf16
    return Row(
        name=name,
        threads=peak.threads,
        quick=quick,
        textbook=times["textbook"],
        tuned=times.get("tuned"),
        ours=times.get("ours"),
        gflop=gflop,
        ceiling=gflop / bound,
        bars=case.bars,
        agreement=case.check(results),
    )


def tell(row: Row) -> str:
    parts = [f"{row.threads}t {row.name:34} textbook {seconds(row.textbook.wall):>8}"]
    if row.tuned:
        parts.append(f"tuned {seconds(row.tuned.wall):>8}")
    if row.ours:
        wall = row.ours.wall
        over = row.textbook.wall / wall, row.tuned.wall / wall if row.tuned else 0.0
        parts.append(f"ours {seconds(wall):>8}  {over[0]:.1f}x {over[1]:.1f}x")
        parts.append(f"{row.gflop / wall:.0f} of {row.ceiling:.0f} GFLOP/s  {row.agreement}")
        if row.threads == 1:
            short = [f"{bar:g}x" for got, bar in zip(over, row.bars, strict=True) if got < bar]
            parts.append(f"BELOW {' and '.join(short)}" if short else "bars met")
    if not row.trusted:
        parts.append("CONTENDED")
    return "  ".join(parts)


def table(rows: list[Row]) -> str:
    """Markdown: one table per thread count, ours on 2 threads also against 1."""
    single = {r.name: r for r in rows if r.threads == 1}
    lines: list[str] = []
    for threads in sorted({r.threads for r in rows}):
        last = "" if threads == 1 else " | times 1 thread"
        lines += [
            f"| {threads} thread{'s' if threads > 1 else ''} | textbook | tuned | ours "
            f"| x textbook | x tuned | ours, GFLOP/s | ceiling, GFLOP/s{last} |",
            "|---|" + "--:|" * (7 if threads == 1 else 8),
        ]
        for r in (r for r in rows if r.threads == threads):
            cells = [r.name + ("" if r.trusted else " (contended)"), seconds(r.textbook.wall)]
            cells.append(seconds(r.tuned.wall) if r.tuned else "")
            if r.ours:
                wall = r.ours.wall
                cells += [seconds(wall), f"{r.textbook.wall / wall:.1f}"]
                cells.append(f"{r.tuned.wall / wall:.1f}" if r.tuned else "")
                cells += [f"{r.gflop / wall:.0f}", f"{r.ceiling:.0f}"]
                one = single.get(r.name)
                if threads > 1:
                    cells.append(f"{one.ours.wall / wall:.2f}" if one and one.ours else "")
            else:
                cells += [""] * (5 if threads == 1 else 6)
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def load(path: Path | None, quick: bool) -> list[Row]:
    if path is None or not path.exists():
        return []
    rows = []
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        for who in ("textbook", "tuned", "ours"):
            row[who] = Timing(**row[who]) if row[who] else None
        rows.append(Row(**{**row, "bars": tuple(row["bars"])}))
    return [r for r in rows if r.quick == quick]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", help="parts of row names (default: every row)")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--quick", action="store_true", help="small shapes, a smoke test")
    parser.add_argument("--rulers-only", action="store_true", help="without the extension")
    parser.add_argument("--json", type=Path, help="kept rows (default: bench/results/speed.json)")
    parser.add_argument("--readme", action="store_true", help="rewrite the table in README.md")
    parser.add_argument("--list", action="store_true", help="print the row names and stop")
    args = parser.parse_args()
    path = args.json or (None if args.quick else ROOT / "bench" / "results" / "speed.json")
    chosen = {
        name: build
        for name, build in cases(args.quick, not args.rulers_only).items()
        if not args.rows or any(part in name for part in args.rows)
    }
    if args.list or not chosen:
        print("\n".join(cases(args.quick, False)))
        raise SystemExit(0 if args.list else 2)
    peaks = []
    for threads in map(int, args.threads.split(",")):
        peaks.append(ceilings.measure(threads, n=512 if args.quick else 2048))
        print(ceilings.describe(peaks[-1]), flush=True)
    order = list(cases(args.quick, False))
    done = {(r.threads, r.name): r for r in load(path, args.quick) if r.name in order}
    for name, build in chosen.items():
        case = build()
        for peak in peaks:
            row = measure(name, case, peak, args.quick)
            done[peak.threads, name] = row
            print(tell(row), flush=True)
            rows = sorted(done.values(), key=lambda r: (r.threads, order.index(r.name)))
            if path:
                harness.save(path, rows, ceilings=[asdict(p) for p in peaks])
        del case
    print(table(rows))
    if args.readme and not args.quick:
        spoilt = [r.name for r in rows if not r.trusted]
        if spoilt:
            raise SystemExit(f"README.md left alone, contended rows: {'; '.join(spoilt)}")
        notes = "\n".join(f"Ceilings, {ceilings.describe(p)}." for p in peaks)
        text = f"{table(rows)}\n{harness.machine()['cpu']}, medians. {notes}"
        harness.write_table(ROOT / "README.md", "speed", text)


if __name__ == "__main__":
    main()
