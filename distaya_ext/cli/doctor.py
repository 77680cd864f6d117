"""`distaya doctor`: what this machine has and which kernel will run."""

from __future__ import annotations

from . import options


def doctor(json: options.Json = False, debug: options.Debug = False) -> None:
    """Print instruction set, threads, GPUs, versions, and the kernel that will run for each job."""
    from rich.table import Table

    from .. import doctor as source
    from .output import console, print_json

    report = source.report()
    if json:
        print_json(report)
        return
    out = console()
    for section, entries in report.items():
        table = Table(title=section, title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in entries.items():
            table.add_row(name, value)
        out.print(table)
