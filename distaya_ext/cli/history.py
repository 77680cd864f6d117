"""`distaya history`: what runs on this machine measured, and what became worse between them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = 3  # changes named in a line


def history(
    model: Annotated[
        str | None, typer.Option(help="Only runs of this model, or from it; its name is enough.")
    ] = None,
    last: Annotated[int, typer.Option(min=1, help="Runs to show.")] = 20,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show earlier runs, newest last, each beside the one before that it can be compared with.

    DISTAYA_HISTORY=FILE keeps them elsewhere, DISTAYA_HISTORY=off keeps none.
    """
    from ..history import earlier, file, past, regressions
    from .output import console, print_json

    found = past()
    chosen = [r for r in found.records if model is None or _is_of(r, Path(model).name)]
    runs = []
    for record in chosen[-last:]:
        before = earlier(found.records, record)
        changes = regressions(record, before[-1]) if before else None
        runs.append({**record, "changes": changes})
    if json:
        print_json({"runs": runs, "skipped_lines": found.skipped})
        return
    out = console()
    if runs:
        out.print(table(runs))
    elif file() is None:
        out.print("the history is off: DISTAYA_HISTORY says so, or there is no home")
    else:
        whose = "" if model is None else f" of {model}"
        out.print(f"no run{whose} is in the history", markup=False)
    if found.skipped:
        out.print(f"{found.skipped} lines are none of ours, or torn; they were left out")


def table(runs: list[dict[str, Any]]) -> Table:
    """A line per run; what became worse is red, and says so where there is no colour."""
    from rich.markup import escape
    from rich.table import Table

    from .output import number, size

    shown = Table(title="runs on this machine, newest last", title_justify="left")
    for head in ("time", "command", "model", "from"):
        shown.add_column(head, overflow="fold")
    for head in ("size", "bits/weight", "tokens/s", "worst language"):
        shown.add_column(head, justify="right")
    shown.add_column("against the run before", overflow="fold")
    for run in runs:
        count = run.get("bytes")
        shown.add_row(
            escape(run["time"][:16].replace("T", " ")),
            escape(run["command"]),
            escape(_name(run.get("model"))),
            escape(_name(run.get("base"))),
            size(count) if _is_number(count) else "-",
            *(
                number(run[key], 2) if _is_number(run.get(key)) else "-"
                for key in ("bits_per_weight", "tokens_per_second")
            ),
            escape(_worst(run)),
            _changes(run["changes"]),
        )
    return shown


def _changes(changes: list[dict[str, Any]] | None) -> str:
    from rich.markup import escape

    if changes is None:
        return "first of its kind"
    if not changes:
        return "nothing beyond noise"
    worse = [_change(c) for c in changes if c["worse"]]
    better = [_change(c) for c in changes if not c["worse"]]
    said = [f"[red]worse: {escape(_list(worse))}[/red]"] if worse else []
    return "; ".join(said + ([f"better: {escape(_list(better))}"] if better else []))


def _list(sentences: list[str]) -> str:
    more = len(sentences) - _SHOWN
    return ", ".join(sentences[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _change(change: dict[str, Any]) -> str:
    from .output import size

    was, now, what = change["was"], change["now"], change["what"]
    if what == "bytes":
        return f"size {size(was)} -> {size(now)}"
    if what == "tokens per second":
        return f"{was:.1f} -> {now:.1f} tokens/s"
    return f"{what} {was:+.3f} -> {now:+.3f}"


def _worst(run: dict[str, Any]) -> str:
    """The language that lost most, in nats per token; by KL where there is no more (search)."""
    languages = run.get("languages")
    for key, digits in (("dnll", "+.3f"), ("kl", ".3f")):
        known = {
            lang: each[key]
            for lang, each in (languages.items() if isinstance(languages, dict) else ())
            if isinstance(each, dict) and _is_number(each.get(key))
        }
        if known:
            worst = max(known, key=known.__getitem__)
            return f"{worst} {key} {known[worst]:{digits}}"
    return "-"


def _is_of(record: dict[str, Any], name: str) -> bool:
    return name in (_name(record.get("model")), _name(record.get("base")))


def _name(model: Any) -> str:
    """Without the fingerprint."""
    return model.rpartition("@")[0] if isinstance(model, str) and "@" in model else "-"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
