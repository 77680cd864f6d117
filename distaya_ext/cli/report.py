"""`distaya report`: the page of a folder, rendered again from what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError, UsageError
from . import options


def report(
    folder: Annotated[
        Path, typer.Argument(help="A folder that distaya wrote.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Write the page to this file and leave the folder as it is."),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write report.html and the model card of FOLDER again, from the results that are in it."""
    from ..checkpoint.writer import is_ours
    from ..finished import complete
    from ..report import REPORT, read, write_pages
    from .output import console, print_json

    if not folder.is_dir():
        raise InputError(f"{folder} is no folder, so there is nothing to report")
    if not is_ours(folder):
        raise InputError(f"{folder} was not written by distaya, so it holds nothing to report")
    if out is not None and not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.absolute().parent} to write into")
    if out is not None and out.is_dir():
        raise UsageError(f"--out {out} is a folder; name a file, such as {out / REPORT}")
    if not read(folder).tells:
        raise InputError(
            f"{folder} holds no results yet; distaya eval or distaya bench model with --report "
            "leaves some"
        )
    if out is None:
        complete(folder)
    else:
        write_pages(folder, out)
    page = folder / REPORT if out is None else out
    if json:
        print_json({"report": str(page), "bytes": page.stat().st_size})
    else:
        tell(console(), page)
    if open_:
        typer.launch(page.absolute().as_uri())


def tell(show: Any, page: Path) -> None:
    """Where a page is."""
    show.print(f"report: {page}", markup=False, soft_wrap=True)


def run_before(command: str) -> dict[str, Any] | None:
    """What changed since the run before the one that was just added to the history: {"time",
    "version", "changes"}. None where there is none, or the history cannot be read.
    """
    from ..history import earlier, read, regressions

    try:
        records = read()
        if not records or records[-1]["command"] != command:
            return None
        past = earlier(records, records[-1])
    except OSError:
        return None
    if not past:
        return None
    changes = regressions(records[-1], past[-1])
    told = {key: str(past[-1].get(key, "")) for key in ("time", "version")}
    return {**told, "changes": changes}
