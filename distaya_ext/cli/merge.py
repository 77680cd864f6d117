"""`distaya merge`: write a PEFT adapter into a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options


def merge(
    model: options.Model,
    adapter: Annotated[
        str,
        typer.Argument(help="PEFT LoRA folder, trained on this model.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write to.", show_default=False)],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an older result of ours.")
    ] = False,
    offline: options.Offline = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write the LoRA of ADAPTER into MODEL.

    Dense weights take it, pruned ones under their mask, and beside quantised ones it stays as
    OUT/adapter, which every command here loads.
    """
    from ..train.merge import merge_adapter
    from .output import print_json, size
    from .progress import Reporter

    with Reporter(quiet) as reporter:
        found = merge_adapter(model, adapter, out, overwrite=overwrite, offline=offline)
        for message in found.notices:
            reporter.say(f"note: {message}")
        reporter.say(
            f"{len(found.merged)} matrices merged, {len(found.masked)} of them under their mask; "
            f"{len(found.beside)} with LoRA beside ({size(found.adapter_bytes)}); "
            f"{found.checked} compared after writing; {found.bits_per_weight_before:.2f} -> "
            f"{found.bits_per_weight:.2f} bits per weight"
        )
    if json:
        print_json({"out": str(out), **found.summary()})
    else:
        typer.echo(str(out))
