"""`distaya verify`: whether a folder is what it says it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options

if TYPE_CHECKING:
    from ..verify import Findings

_SHOWN = 20


def verify(
    model: options.Model,
    quick: Annotated[
        bool, typer.Option("--quick", help="Sizes instead of hashes, and no weight is read.")
    ] = False,
    offline: options.Offline = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Check MODEL: files against the manifest, headers, finiteness, codes, N:M counts; exit 3."""
    from ..verify import verify as look
    from .output import console, print_json

    found = look(model, quick=quick, offline=offline)
    if json:
        print_json(found.to_dict())
    else:
        out = console()
        for note in found.notes:
            out.print(f"note: {note}", markup=False, soft_wrap=True)
        if found.ok:
            out.print(found.sentence(), markup=False, soft_wrap=True)
        else:
            out.print(table(found))
    found.refuse()


def table(found: Findings) -> Any:
    """The first faults, and how many more there are."""
    from rich.table import Table

    shown = Table(title=f"{len(found.found)} faults in {found.folder}", title_justify="left")
    for head in ("check", "where", "what"):
        shown.add_column(head, overflow="fold")
    for each in found.found[:_SHOWN]:
        shown.add_row(each.check, each.where, each.what)
    if len(found.found) > _SHOWN:
        shown.add_section()
        shown.add_row("", "", f"and {len(found.found) - _SHOWN} more (--json lists all)")
    return shown
