"""`distaya export`: a packed folder in a format that others read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="Packed folder or hub id: ours, pack-quantized or GPTQ.", show_default=False
        ),
    ],
    to: Annotated[str, typer.Option(help="dense, pack-quantized or gptq.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write to.", show_default=False)],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an older result of ours.")
    ] = False,
    offline: options.Offline = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write the quantised MODEL in another format, its codes unchanged."""
    from ..export import export as run
    from .output import print_json, size
    from .progress import Reporter

    with Reporter(quiet) as reporter:
        found = run(
            model,
            out,
            to,
            overwrite=overwrite,
            offline=offline,
            on_module=reporter.on_module,
        )
        for message in found.notices:
            reporter.say(f"note: {message}")
        reporter.say(f"{found.modules} matrices, {found.shards} shards, {size(found.bytes)}")
    if json:
        print_json(
            {
                "out": str(out),
                "to": to,
                "modules": found.modules,
                "bytes": found.bytes,
                "notices": found.notices,
            }
        )
    else:
        typer.echo(str(out))
