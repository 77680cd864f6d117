"""What the figures of bench/gpu.py must reach, whether they do, and the tables of README.md.

A bar over several cases is met when the worst of them meets it; that one is named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench import harness
from bench.gpu_report import Report, Section, duration, origin
from bench.gpu_report import table as figures

RULER = "torch bf16"  # cuBLAS, as gpu_products.py calls it
SMALL, LARGE = range(1, 17), range(512, 1 << 30)
NOT_YET = "not yet measured"

Found = tuple[float, str] | None  # the worst value and where it was


@dataclass(frozen=True)
class Bar:
    """must and goal: at least so many times, or for `most` at most so many seconds or GB."""

    name: str
    worst: Callable[[Report], Found]
    must: float
    goal: float | None = None
    unit: str = "x"
    most: bool = False

    def met(self, value: float, bar: float) -> bool:
        return value <= bar if self.most else value >= bar


def products(report: Report) -> list[dict]:
    """Rows that are products and were measured beside the ruler."""
    rows = [row for s in report.sections if s.name == "sqgemm" for row in s.rows]
    return [r for r in rows if r.get("of") and RULER in r.get("rulers", {}) and r.get("ours")]


def worst(found: list[tuple[float, str]]) -> Found:
    return min(found) if found else None


def speed(kind: str, tokens: range) -> Callable[[Report], Found]:
    """Least ratio of cuBLAS bf16's time to ours, over all matrices of a layer (int8: the head)."""

    def over(report: Report) -> Found:
        rows = [r for r in products(report) if r["of"]["kind"] == kind]
        rows = [r for r in rows if r["of"]["tokens"] in tokens]
        if kind == "int8":
            rows = [r for r in rows if r["of"]["rows"] > 100_000]
        return worst(
            [(r["rulers"][RULER]["median"] / r["ours"]["median"], r["name"]) for r in rows]
        )

    return over


def sparse_over_dense(report: Report) -> Found:
    """Least ratio of our int4's time to our 2:4 int4's, up to 64 tokens."""
    times: dict[str, dict[tuple, dict]] = {"int4": {}, "int4-2:4": {}}
    for row in products(report):
        of = row["of"]
        if of["kind"] in times and of["tokens"] <= 64:
            times[of["kind"]][of["op"], of["rows"], of["cols"], of["tokens"]] = row
    dense, sparse = times.values()
    return worst(
        [
            (dense[key]["ours"]["median"] / row["ours"]["median"], row["name"])
            for key, row in sparse.items()
            if key in dense
        ]
    )


def whole(key: str, scale: float = 1.0) -> Callable[[Report], Found]:
    """What bench/gpu_whole.py says of our compression of a whole model; none of part of one.

    The bars are of quality plain: their floor counts one stream of hidden states and one sweep.
    """

    def of(report: Report) -> Found:
        rows = [row for s in report.sections if s.name == "whole" for row in s.rows]
        rows = [r for r in rows if r.get("whole") and r.get("quality") == "plain"]
        rows = [r for r in rows if r.get(key) is not None]
        return (rows[0][key] / scale, rows[0]["name"]) if rows else None

    return of


BARS = (
    Bar("int4, 1 to 16 tokens, over cuBLAS bf16", speed("int4", SMALL), 2.6, 3.3),
    Bar("int4, 64 tokens", speed("int4", range(64, 65)), 1.6, 2.4),
    Bar("2:4 int4, 1 to 16 tokens", speed("int4-2:4", SMALL), 3.3, 4.3),
    Bar("2:4 int4, 64 tokens", speed("int4-2:4", range(64, 65)), 2.3, 3.2),
    Bar("2:4 int4 over our int4, up to 64 tokens", sparse_over_dense, 1.2),
    Bar("2:4 int4, 128 tokens", speed("int4-2:4", range(128, 129)), 2.4, 3.4),
    Bar("int4, 512 tokens and more", speed("int4", LARGE), 0.85),
    Bar("2:4 int4, 512 tokens and more", speed("int4-2:4", LARGE), 0.85),
    Bar("int8 head, 1 to 16 tokens", speed("int8", SMALL), 1.7, 1.9),
    Bar("whole model compressed, quality plain, in", whole("seconds"), 60, 30, "s", most=True),
    Bar("peak of GPU memory meanwhile", whole("peak_vram", 1e9), 20, None, "GB", most=True),
)


def value(number: float, unit: str) -> str:
    return f"{number:.2f}x" if unit == "x" else f"{number:.3g} {unit}"


def row_of(bar: Bar, report: Report) -> list[str]:
    found = bar.worst(report)
    asked = f"{'<=' if bar.most else '>='} {value(bar.must, bar.unit)}"
    goal = value(bar.goal, bar.unit) if bar.goal is not None else "-"
    if found is None:
        return [bar.name, asked, goal, NOT_YET, "-", "-"]
    met = "met" if bar.met(found[0], bar.must) else "not met"
    if met == "met" and bar.goal is not None and bar.met(found[0], bar.goal):
        met = "goal reached"
    return [bar.name, asked, goal, value(found[0], bar.unit), found[1], met]


def checks(report: Report) -> list[list[str]]:
    """The GPU tests and the sanitizers in the same form."""
    by_name: dict[str, Section] = {s.name: s for s in report.sections}
    lines = []
    for name, asked in (("tests", "`pytest -m cuda`"), ("sanitize", "compute-sanitizer")):
        s = by_name.get(name)
        told = [s.said, "met" if s.status == "ok" else "not met"] if s else [NOT_YET, "-"]
        lines.append([asked, "clean", "-", "-", *told])
    return lines


def table(report: Report) -> str:
    """Markdown: every bar, what is asked, the worst that was measured and where."""
    head = ["bar", "asked", "goal", "worst", "where", "verdict"]
    lines = [head, ["---", "---", "---", "--:", "---", "---"], *checks(report)]
    lines += [row_of(bar, report) for bar in BARS]
    return "\n".join(f"| {' | '.join(text.replace('|', '/') for text in line)} |" for line in lines)


def write_readme(report: Report, path: Path) -> None:
    """Replace what stands between README's gpu markers. ValueError for a smoke test."""
    if report.facts.get("smoke") or not report.facts.get("capability"):
        raise ValueError("figures for README come from a GPU, not from a smoke test")
    seconds = sum(s.seconds for s in report.sections)
    text = (
        f"{table(report)}\n\n{origin(report)}; {duration(seconds)} in all.\n\n"
        "<details><summary>Every figure, with its roofline</summary>\n\n"
        f"{figures(report)}\n\n</details>"
    )
    harness.write_table(path, "gpu", text)
