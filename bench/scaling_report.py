"""The figures of bench/scaling.py as they are judged and shown."""

from __future__ import annotations

import statistics
from typing import Any

_HEADS = ("one process", "two ranks", "two runs at once that share nothing")
_CLOCKS = ("wall", "run")


def judged(found: dict[str, Any]) -> dict[str, Any]:
    """The measurements with what follows from them. efficiency: T1 / (2 T2); ceiling: what two runs
    that share nothing reach of it; same_bits: of the two ranks and one process with two parts.
    """
    rows = [*found["rows"], *found["both"]]
    medians = {
        clock: {
            name: statistics.median(row[clock] for row in rows if row["name"] == name)
            for name in _HEADS
        }
        for clock in _CLOCKS
    }
    one, two, both = _HEADS
    told = {
        "medians": medians,
        "efficiency": {c: medians[c][one] / (2 * medians[c][two]) for c in _CLOCKS},
        "ceiling": {c: medians[c][one] / medians[c][both] for c in _CLOCKS},
    }
    ranks = {row["weights"] for row in rows if row["name"] == two}
    return {**found, **told, "same_bits": ranks == {found["parts"]["weights"]}}


def text(found: dict[str, Any]) -> str:
    """The Markdown table, and what it was measured on."""
    medians, plan = found["medians"], {row["ranks"]: row for row in found["plan"]["rows"]}
    lines = ["| | the command | of it the run |", "|---|--:|--:|"]
    for name in _HEADS:
        lines.append(
            f"| {name} | " + " | ".join(f"{medians[c][name]:.1f} s" for c in _CLOCKS) + " |"
        )
    told = {"efficiency of two ranks, T1 / (2 T2)": found["efficiency"]}
    told["what two runs that share nothing reach here"] = found["ceiling"]
    for name, each in told.items():
        lines.append(f"| {name} | " + " | ".join(f"{each[c]:.2f}" for c in _CLOCKS) + " |")
    layers = plan[1]["layer"] / (2 * plan[2]["layer"])
    lines.append(
        f"| efficiency that `distaya plan --ranks` expected | {plan[2]['efficiency']:.2f} | "
        f"{layers:.2f} (of the layers) |"
    )
    model, machine = found["model"], found["machine"]
    runs = sum(row["name"] == _HEADS[0] for row in found["rows"])
    same = "the same" if found["same_bits"] else "NOT the same"
    note = (
        f"{model['layers']} layer{'s' * (model['layers'] > 1)} of {model['name']}'s shape, quality "
        f"{found['recipe']['quality']}, {found['tokens']} tokens in windows of {found['window']}; "
        f"one thread for each process, {machine['cores']} cores of {machine['cpu']}, "
        f"{found['date'][:10]}; medians of {runs}, in turns. Perfect is 1.00. Two ranks gave "
        f"{same} bits as one process that sums in two parts. {_bytes(found, plan[2])}"
    )
    return "\n".join(lines) + "\n\n" + note.strip()


def _bytes(found: dict[str, Any], plan: dict[str, Any]) -> str:
    """Bytes of a rank as the run counts them beside those expected, and how long it waited."""
    runs = [row for row in found["rows"] if row["name"] == _HEADS[1]]
    sent, read = (max(rank[what] for rank in runs[0]["ranks"]) for what in ("sent", "read"))
    waited = statistics.median(max(rank["waited"] for rank in row["ranks"]) for row in runs)
    peak = {name: max(r["peak"] for r in found["rows"] if r["name"] == name) for name in _HEADS[:2]}
    return (
        f"A rank sent {sent / 2**20:.1f} MiB ({plan['sent'] / 2**20:.1f} expected), read "
        f"{read / 2**20:.1f} MiB of weights ({plan['read'] / 2**20:.1f} expected) and waited "
        f"{waited:.1f} s for the other or for the wire. It held at most "
        f"{peak[_HEADS[1]] / 2**20:.0f} MiB, one process {peak[_HEADS[0]] / 2**20:.0f} MiB."
    )


def parts(found: dict[str, Any]) -> str:
    """What the cost model expected, by part, beside what was measured."""
    rows = found["plan"]["rows"]
    heads = [part for part in rows[0]["parts"] if any(row["parts"][part] for row in rows)]
    lines = ["| ranks | " + " | ".join(heads) + " | run, expected | run, measured |"]
    lines.append("|" + "--:|" * (len(heads) + 3))
    for row, name in zip(rows, _HEADS, strict=False):
        cells = [f"{row['parts'][part]:.2f}" for part in heads]
        measured = found["medians"]["wall"][name]
        cells += [f"{row['seconds']:.1f} s", f"{measured:.1f} s"]
        lines.append(f"| {row['ranks']} | " + " | ".join(cells) + " |")
    wire = found["plan"]["wire"]
    note = (
        f"Seconds of a layer by part, simulated, with {wire['bytes_per_second'] / 1e9:.2f} GB/s "
        f"between the ranks ({wire['source']}). {found['plan']['sentence']}."
    )
    return "\n".join(lines) + "\n\n" + note
