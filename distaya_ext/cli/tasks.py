"""`distaya eval --tasks`: questions of lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from ..tasks import TaskResults

_MEANING = (
    "lost, won: questions that only the base, only the model had right; p: how likely a fair coin "
    "divides them as unevenly (exact McNemar test). Of twenty tasks one is below 0.05 by chance."
)


def answer(
    model: str,
    tasks: str,
    against: str | None,
    task_path: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    running: dict[str, Any],
    json: bool,
    quiet: bool,
) -> None:
    """Run the tasks, print the table or JSON."""
    from ..tasks import run_tasks
    from .output import console, print_json
    from .progress import Reporter

    # The harness draws bars on stderr by itself; a file or pipe gets plain lines instead.
    bars = sys.stderr.isatty() and not quiet
    with Reporter(quiet) as reporter:
        hide = contextlib.nullcontext() if bars else contextlib.redirect_stderr(io.StringIO())
        with hide:
            found = run_tasks(
                model,
                tasks.split(","),
                against=against,
                task_path=task_path,
                limit=limit,
                num_fewshot=num_fewshot,
                on_note=reporter.say,
                **running,
            )
    if json:
        print_json(found.to_dict())
        return
    out = console()
    out.print(table(found))
    if found.base is not None:
        out.print(_MEANING, markup=False, style="dim")


def table(found: TaskResults) -> Table:
    """A line per task and metric, the base beside the model."""
    from rich.table import Table

    from .output import interval

    against = "" if found.base is None else f" against {found.base}"
    shown = Table(title=f"{found.model}{against}, lm-eval {found.harness}", title_justify="left")
    for head in ("task", "metric"):
        shown.add_column(head)
    heads = ["questions", "shots"]
    heads += ["value", "95 % CI"] if found.base is None else ["before", "after", "delta", "95 % CI"]
    heads += [] if found.base is None else ["lost", "won", "p"]
    for head in heads:
        shown.add_column(head, justify="right")
    for row in found.rows:
        cells = [row.task, row.metric, _whole(row.questions), _whole(row.shots)]
        if found.base is None:
            cells += [f"{row.value:.4g}", interval(row.value_interval, sign=False)]
        else:
            cells += [f"{row.base:.4g}", f"{row.value:.4g}", f"{row.delta:+.4g}"]
            cells += [interval(row.delta_interval), _whole(row.lost), _whole(row.won)]
            cells.append("-" if row.p is None else f"{row.p:.3g}")
        shown.add_row(*cells)
    return shown


def _whole(count: int | None) -> str:
    return "-" if count is None else str(count)
