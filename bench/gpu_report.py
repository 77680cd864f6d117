"""What bench/gpu.py leaves behind: the JSON file and the table."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
UNITS = {"copy": ("GB/s", 1), "bf16": ("TFLOP/s", 1e3), "fp32": ("TFLOP/s", 1e3)}
SHOWN = 15  # failures on the screen
HEADINGS = ("case", "ours", "torch", "reached", "roofline", "share", "differs", "note")


@dataclass
class Section:
    """What became of one section. status: ok | failed | skipped; said: why, or what it found."""

    name: str
    status: str = "ok"
    said: str = ""
    seconds: float = 0.0
    budget: float = 0.0
    rows: list[dict] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """One sentence per thing that went wrong."""
        found = [f"{self.name}: {self.said}"] if self.status == "failed" and self.said else []
        return found + [
            f"{self.name}: {r['name']}: {r['error']}" for r in self.rows if "error" in r
        ]


@dataclass
class Report:
    """A whole run. facts: device, torch, archs ...; ceilings: GB/s ("copy") and GFLOP/s."""

    facts: dict = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        return [line for section in self.sections for line in section.failures]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        body = asdict(self) | {"failures": self.failures}
        path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Report:
        """What save() wrote."""
        body = json.loads(path.read_text(encoding="utf-8"))
        sections = [Section(**section) for section in body["sections"]]
        return cls(body["facts"], body["ceilings"], sections)


def _first_line(*command: str) -> str | None:
    """What a command says first; None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def circumstances() -> dict:
    """Date, git commit (and whether files differ from it) and driver; None where unknown."""
    commit = _first_line("git", "rev-parse", "HEAD")
    changed = _first_line("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "changed_since_commit": None if commit is None else changed is not None,
        "driver": _first_line(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"
        ),
    }


def results_file(facts: dict, folder: Path = RESULTS) -> Path:
    """<device>-<date>.json, with a number behind where an earlier run of that day has the name."""
    device = re.sub(r"[^a-z0-9]+", "-", str(facts.get("device", "gpu")).lower()).strip("-")
    stem = f"{device}-{facts['date'][:10]}"
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    return path


def duration(seconds: float) -> str:
    """In the unit that fits: 5.12 us, 0.512 ms, 51.2 ms, 5.12 s."""
    if seconds >= 1:
        return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"
    ms = seconds * 1e3
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.3g} ms" if ms >= 0.1 else f"{ms * 1e3:.3g} us"


def roofline(work: dict[str, float], ceilings: dict[str, float]) -> tuple[float, str] | None:
    """The least seconds that the measured ceilings allow for some work, and by which of them.

    None where no ceiling that it needs was measured.
    """
    known = [name for name in work if ceilings.get(name)]
    if not known:
        return None
    return max((work[name] / ceilings[name], name) for name in known)


def reached(
    work: dict[str, float], seconds: float, ceilings: dict[str, float]
) -> tuple[str, str, str]:
    """Rate, least time and share of the rate that it stands for."""
    least = roofline(work, ceilings)
    name = least[1] if least else next(iter(work))
    unit, scale = UNITS[name]
    rate = f"{work[name] / seconds / scale:.3g} {unit}"
    if not least:
        return rate, "-", "-"
    return rate, f"{duration(least[0])} ({name})", f"{least[0] / seconds:.1%}"


def plain(key: str, value: object) -> str:
    """What a row of the section whole says beside its seconds."""
    name = key.removesuffix("_seconds").replace("_", " ")
    if isinstance(value, str | bool):
        return f"{name}: {value}"
    if key.endswith("seconds"):
        return f"{name} {duration(value)}"
    return f"{name} {value / 1e9:.3g} GB" if key.startswith("peak") else f"{name} {value:g}"


def cells(row: dict, ceilings: dict[str, float]) -> list[str]:
    if "ours" not in row and "error" in row:
        return [row["name"], *["-"] * 6, row["error"]]
    if "ours" not in row:  # of the section whole
        work, seconds = row.get("work"), row.get("seconds") or 0.0
        more = {k: v for k, v in row.items() if k not in ("name", "seconds", "work", "whole")}
        told = ", ".join(plain(key, value) for key, value in more.items() if value is not None)
        rate = reached(work, seconds, ceilings) if work and seconds else ("-", "-", "-")
        return [row["name"], duration(seconds), "-", *rate, "-", told]
    ours = row["ours"]["median"]
    rulers = [
        f"{name} {duration(t['median'])} (x{t['median'] / ours:.2g})"
        for name, t in row["rulers"].items()
    ]
    notes = "; ".join(row[key] for key in ("error", "note") if key in row)
    return [
        row["name"],
        duration(ours),
        "; ".join(rulers),
        *reached(row["work"], ours, ceilings),
        "-" if row["difference"] is None else f"{row['difference']:.0e}",
        notes,
    ]


def table(report: Report) -> str:
    """The figures as a Markdown table, wide as it needs; under it what the columns mean."""
    grid = Table(*HEADINGS, box=box.MARKDOWN)
    for column in grid.columns:
        column.no_wrap = True
    for section in report.sections:
        for row in section.rows:
            grid.add_row(*cells(row, report.ceilings))
    out = StringIO()
    Console(file=out, width=1000).print(grid)
    lines = [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]
    return "\n".join(lines) if grid.row_count else "no figures"


def origin(report: Report) -> str:
    """What the figures hold for, in a line or two."""
    facts, ceilings = report.facts, report.ceilings
    kind = "SMOKE TEST, no figures of any worth, " if facts.get("smoke") else ""
    commit = (facts.get("commit") or "unknown")[:10]
    lines = [
        f"{kind}{facts.get('device', 'unknown device')}, {facts.get('date', '')[:10]}, driver "
        f"{facts.get('driver') or 'unknown'}, torch {facts.get('torch')}, kernels for "
        f"{' '.join(facts.get('archs', [])) or 'the CPU alone'}, commit {commit}"
        + (" with changes" if facts.get("changed_since_commit") else "")
    ]
    if ceilings:
        lines.append(
            f"Ceilings, measured in this run: copy {ceilings['copy']:.0f} GB/s, matmul bf16 "
            f"{ceilings['bf16'] / 1e3:.3g}, fp32 {ceilings['fp32'] / 1e3:.3g} TFLOP/s"
        )
    return "\n".join(lines)


def closing(report: Report) -> str:
    """Circumstances, ceilings, what every section came to, and the failures once more."""
    lines = [origin(report)]
    for s in report.sections:
        cut = sum("note" in row for row in s.rows)
        said = f", {cut} rows with notes" if cut else ""
        said += f", {s.said}" if s.said else ""
        lines.append(f"{s.name:9} {s.status:8} {s.seconds:6.1f} of {s.budget:.0f} s{said}")
    lines += [f"FAILED {line}" for line in report.failures[:SHOWN]]
    if len(report.failures) > SHOWN:
        lines.append(f"FAILED and {len(report.failures) - SHOWN} more, all in the file")
    return "\n".join(lines)
