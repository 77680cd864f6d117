"""What `distaya bench` says: tables for the console and for README, and the JSON of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from . import clock

if TYPE_CHECKING:
    from rich.table import Table

    from .kernels import Result, Row
    from .layer import LayerRow
    from .model import ModelResult

VERSION = 1


def milliseconds(seconds: float) -> str:
    """Three digits of a time in ms."""
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def limit(row: Row) -> str:
    """What was reached of the limit that binds, e.g. "31.0 of 41.0 GB/s"."""
    if row.bound == "memory":
        return f"{row.gbs:.1f} of {row.gbs / row.reached:.1f} GB/s"
    return f"{row.gops:.0f} of {row.gops / row.reached:.0f} GOP/s"


def share(row: Row) -> str:
    """A row against the read that took turns with it, e.g. "31.0 of 35.2 GB/s (88 %)"."""
    return f"{row.gbs:.1f} of {row.read:.1f} GB/s ({100 * row.gbs / row.read:.0f} %)"


def kernel_tables(rows: Sequence[Row]) -> Iterable[Table]:
    """One table for each shape and number of threads, the tokens below each other."""
    from rich.table import Table

    for (shape, threads), found in _by(rows, lambda r: (r.shape, r.threads)).items():
        first = found[0]
        plural = "s" * (threads > 1)
        title = f"{shape} {first.rows}x{first.cols}, {threads} thread{plural}"
        table = Table(title=title, title_justify="left")
        table.add_column("tokens", justify="right")
        table.add_column("kernel")
        rulers = [r.name for r in found if r.kind is None and r.tokens == first.tokens]
        heads = ["MiB", "ms", "GB/s", "GOP/s", "of the limit", *(f"x {name}" for name in rulers)]
        for head in heads:
            table.add_column(head, justify="right")
        for same in _by(found, lambda r: r.tokens).values():
            table.add_section()
            for row in same:
                table.add_row(*_cells(row, rulers), style="dim" if row.kind is None else None)
        yield table


def _cells(row: Row, rulers: list[str]) -> list[str]:
    mark = " (contended)" if row.contended else ""
    memory = row.bound == "memory"
    share = f"{100 * row.reached:.0f} % of {'read' if memory else 'peak'}"
    return [
        str(row.tokens),
        row.name + mark,
        f"{row.nbytes / 2**20:.1f}",
        milliseconds(row.seconds),
        f"{row.gbs:.1f}",
        f"{row.gops:.0f}",
        share,
        *(f"{row.ratios[name]:.2f}" for name in rulers),
    ]


def markdown(rows: Sequence[Row], columns: Sequence[str], main: str = "int4") -> str:
    """Milliseconds of each kernel in `columns`, one line for each shape and number of tokens.

    Beside them what `main` reached of its limit (for few tokens: of the read that took turns with
    it) and how many times faster than the rulers it is.
    """
    lines: list[str] = []
    for threads, found in _by(rows, lambda r: r.threads).items():
        names = [name for name in columns if any(r.name == name for r in found)]
        rulers = [n for n in names if any(r.name == n and r.kind is None for r in found)]
        head = [f"{threads} thread{'s' * (threads > 1)}, ms", "tokens", *names]
        head += [f"{main}, of the limit", *(f"{main} x {n.removeprefix('torch ')}" for n in rulers)]
        lines += ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
        for (shape, tokens), same in _by(found, lambda r: (r.shape, r.tokens)).items():
            by_name = {r.name: r for r in same}
            cells = [shape, str(tokens)]
            for name in names:
                row = by_name.get(name)
                mark = " (contended)" if row and row.contended else ""
                cells.append(milliseconds(row.seconds) + mark if row else "")
            row = by_name.get(main)
            cells.append("" if row is None else limit(row) if row.read is None else share(row))
            cells += [f"{row.ratios[n]:.2f}" if row and n in row.ratios else "" for n in rulers]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def kernels_json(result: Result, **more: Any) -> dict[str, Any]:
    """One JSON object; every number in it was measured in this run."""
    return {
        "version": VERSION,
        "bench": "kernels",
        "machine": clock.machine(),
        "limits": [asdict(found) for found in result.limits],
        **more,
        "notes": result.notes,
        "contended": len(result.contended),
        "rows": [asdict(row) for row in result.rows],
    }


def _by(rows: Iterable[Any], key) -> dict[Any, list[Any]]:
    """Rows with equal keys together, in the order of first appearance."""
    found: dict[Any, list[Any]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def model_table(result: ModelResult) -> Table:
    """Models side by side: rates, bytes, and the ratios below."""
    from rich.table import Table

    from ..cli.output import size

    first = result.rows[0]
    plural = "s" * (first.threads > 1)
    title = f"{first.prompt} prompt tokens, {first.new} decoded, {first.threads} thread{plural}"
    table = Table(title=title, title_justify="left")
    for head in ("model", "weights"):
        table.add_column(head, overflow="fold")
    graphs = ["as a CUDA graph"] if any(row.graph_rate for row in result.rows) else []
    for head in ("resident", "prefill tokens/s", "decode tokens/s", *graphs):
        table.add_column(head, justify="right")
    for row in result.rows:
        mark = " (contended)" if row.contended else ""
        rates = [f"{row.prefill_rate:.1f}", f"{row.decode_rate:.1f}{mark}"]
        rates += [f"{row.graph_rate:.1f}" if row.graph_rate else "" for _ in graphs]
        table.add_row(row.name, row.weights, size(row.nbytes), *rates)
    ratios = result.ratios
    if ratios:
        cells = [f"{100 * ratios['bytes']:.1f} %"]
        cells += [f"{ratios[what]:.2f}x" for what in ("prefill", "decode")]
        cells += [f"{ratios['graph']:.2f}x" if "graph" in ratios else "" for _ in graphs]
        table.add_section()
        table.add_row("first against second", "", *cells)
    return table


def model_json(result: ModelResult) -> dict[str, Any]:
    """One JSON object; every number in it was measured in this run."""
    return {
        "version": VERSION,
        "bench": "model",
        "machine": clock.machine(),
        "read": result.read,
        "in_cache": result.in_cache,
        "ratios": result.ratios,
        "contended": sum(row.contended for row in result.rows),
        "rows": [asdict(row) for row in result.rows],
    }


def layer_table(rows: Sequence[LayerRow]) -> Table:
    """One line for each way the layer's weights are kept and number of threads."""
    from rich.table import Table

    title = f"one {rows[0].model} layer, decode, weights from memory"
    table = Table(title=title, title_justify="left")
    table.add_column("threads", justify="right")
    table.add_column("weights")
    for head in ("MiB", "tokens/s", "GB/s", "x dense bf16"):
        table.add_column(head, justify="right")
    for row in rows:
        mark = " (contended)" if row.contended else ""
        cells = [f"{row.nbytes / 2**20:.0f}", f"{row.tokens_per_second:.0f}", f"{row.gbs:.1f}"]
        table.add_row(str(row.threads), row.name + mark, *cells, f"{row.times_dense:.2f}")
    return table


def layer_json(rows: Sequence[LayerRow]) -> dict[str, Any]:
    """One JSON object; every number in it was measured in this run."""
    return {
        "version": VERSION,
        "bench": "layer",
        "machine": clock.machine(),
        "contended": sum(row.contended for row in rows),
        "rows": [asdict(row) for row in rows],
    }


def layer_lines(rows: Sequence[LayerRow]) -> list[str]:
    """One sentence for each packed row."""
    return [
        f"{row.model} layer, {row.threads} thread{'s' * (row.threads > 1)}, {row.name}: "
        f"{row.tokens_per_second:.0f} tokens/s, {row.times_dense:.2f}x dense bf16, "
        f"{row.nbytes / 2**20:.0f} MiB" + (" (contended)" if row.contended else "")
        for row in rows
    ]
