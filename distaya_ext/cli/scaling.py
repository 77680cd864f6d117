"""Tables of a run as several processes, which `distaya plan --ranks` simulates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from ..planning.scaling import Scaling


def tables(found: Scaling) -> Iterator[Table | str]:
    """Seconds, bytes, and what is to be said of them."""
    if found.sentence is not None:
        yield _seconds(found)
    yield _bytes(found)
    if found.sentence is not None:
        yield found.sentence
    for notice in found.notices:
        yield f"ranks: {notice}"


def _seconds(found: Scaling) -> Table:
    from rich.table import Table

    from ..planning.scaling import KIND, PARTS

    table = Table(title=f"As several ranks: seconds of a layer ({KIND})", title_justify="left")
    for head in ("ranks", *PARTS, "layer", "run", "efficiency"):
        table.add_column(head, justify="right")
    for row in found.rows:
        parts = (f"{row.parts[part]:.3g}" for part in PARTS)
        whole = (f"{row.layer:.3g}", f"{row.seconds:.4g}", f"{row.efficiency:.2f}")
        table.add_row(str(row.ranks), *parts, *whole)
    return table


def _bytes(found: Scaling) -> Table:
    from rich.table import Table

    from ..planning.passed import KINDS
    from ..planning.scaling import KIND
    from .output import size

    wire = f"{found.wire.rate / 1e9:.3g} GB/s, {found.wire.source}"
    title = f"As several ranks: what each receives for a layer ({KIND}; wire {wire})"
    table = Table(title=title, title_justify="left")
    heads = ("ranks", *KINDS, "sent in all", "read in all", "memory of a rank")
    for head in heads:
        table.add_column(head, justify="right")
    for row in found.rows:
        come = (size(row.bytes[kind][1]) for kind in KINDS)
        whole = (size(row.sent), size(row.read), size(row.memory))
        table.add_row(str(row.ranks), *come, *whole)
    return table
