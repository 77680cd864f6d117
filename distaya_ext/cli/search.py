"""`distaya search`: the best recipe for a size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from . import options

if TYPE_CHECKING:
    from rich.table import Table

    from ..search import Found, Options


def search(
    model: options.Model,
    calib: Annotated[
        Path,
        typer.Option(
            help="Folder of <lang>.txt, .jsonl or .parquet to measure on.", show_default=False
        ),
    ],
    target_size: Annotated[
        str | None, typer.Option(help="Bytes of all weight files, such as 4.2GB.")
    ] = None,
    bits_per_weight: Annotated[
        float | None,
        typer.Option(help="Bits per weight of the layers' Linears, scales included, such as 3.5."),
    ] = None,
    choices: Annotated[
        str | None,
        typer.Option(
            help="What a matrix may become: bf16, int8, int4, int3, N:M+int4, mask-S+int4, each "
            "but bf16 with -g32, -g64, -g128 or -g0 behind it; separated by commas."
        ),
    ] = None,
    per: Annotated[
        str, typer.Option(help="matrix, or stage: matrices of one input together, fewer runs.")
    ] = "matrix",
    drop: Annotated[bool, typer.Option("--drop", help="Whole layers may be left out.")] = False,
    weights: Annotated[
        str,
        typer.Option(help="mean, worst, max, or the share of the worst language from 0 to 1."),
    ] = "worst",
    search_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens to measure on, half to decide and half to report.")
    ] = 16384,
    polish: Annotated[int, typer.Option(min=0, help="Swaps to measure after the allocation.")] = 0,
    group: Annotated[int, typer.Option(help="Inputs per scale: 32, 64, 128 or 0 (row).")] = 128,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="Grids with or without zeros.")
    ] = None,
    embed_bits: options.EmbedBits = None,
    quality: Annotated[
        str | None, typer.Option(help="Of the recipe: plain, default or high (see compress).")
    ] = None,
    tokens: options.CalibTokens = None,
    window: options.CalibWindow = None,
    seed: options.Seed = None,
    parts: options.Parts = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write the recipe to; printed without it.")
    ] = None,
    max_ram: options.MaxRam = None,
    device: options.Device = "cpu",
    offline: options.Offline = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Find what to do to each matrix of MODEL so that a size is met and least is lost."""
    from ..ranks import team
    from ..recipe import CalibrationSpec
    from ..search import DEFAULT, Options

    spec = {"tokens": tokens, "window": window, "seed": seed, "parts": parts}
    asked = Options(
        target_size=target_size,
        bits_per_weight=bits_per_weight,
        choices=choices or DEFAULT,
        weights=weights,
        per=per,
        drop=drop,
        search_tokens=search_tokens,
        polish=polish,
        calibration=CalibrationSpec(**{k: v for k, v in spec.items() if v is not None}),
        group=group,
        symmetric=symmetric,
        embed_bits=embed_bits,
        quality=quality,
        max_ram=max_ram,
    )
    us = team()
    if us.tell(out is not None and out.exists()):
        raise UsageError(f"{out} exists; name another file for the recipe")
    found = _run(model, calib, asked, device, offline, quiet or not us.first)
    if us.first:
        _put_out(found, model, calib, out, json)


def _run(model: str, calib: Path, asked: Options, device: str, offline: bool, quiet: bool) -> Found:
    from ..search import search as run
    from .progress import Reporter

    with Reporter(quiet) as reporter:
        found = run(
            model,
            calib,
            asked,
            on_event=reporter.on_event,
            on_progress=reporter.on_search,
            device=device,
            offline=offline,
        )
        reporter.say(summary(found))
    return found


def _put_out(found: Found, model: str, calib: Path, out: Path | None, json: bool) -> None:
    """The recipe into its file, the run into the history, the table onto the screen."""
    from .output import console, print_json
    from .remember import searched

    if out is not None:
        found.recipe.to_yaml(out)
    searched(found, model, calib)
    if json:
        print_json({**found.to_dict(), "out": None if out is None else str(out)})
        return
    console().print(table(found))
    if out is None:
        typer.echo(found.recipe.to_yaml(), nl=False)
    else:
        typer.echo(str(out))


def summary(found: Found) -> str:
    """What the search cost, in a line."""
    cost = found.cost
    parts = ("gather", "solve", "measure", "allocate", "verify", "polish")
    times = ", ".join(f"{part} {cost[part]:.1f}" for part in parts if cost[part])
    proof = "the best for the sum of single losses" if found.exact else "not proved to be the best"
    return (
        f"{cost['variants']} variants measured in {cost['seconds']:.1f} s ({times} s); the "
        f"allocation is {proof}, {found.accepted} swaps taken"
    )


def table(found: Found) -> Table:
    """Size against loss: the recipe first, uniform choices behind it, those of its size marked."""
    from rich.table import Table

    from .output import interval, number

    shown = Table(title=f"KL to the dense model in nats per token, {_mix(found.alpha)}")
    shown.add_column("what")
    for name in ("bytes", "bits/weight", "objective", "mean KL", "95 %", "worst KL"):
        shown.add_column(name, justify="right")
    shown.add_column("language")
    for row in found.rows:
        mark = "recipe" if row.searched else f"all {row.name}"
        shown.add_row(
            f"{mark} (same size)" if row.same_size else mark,
            f"{row.bytes:,}",
            f"{row.bits_per_weight:.3f}",
            number(row.objective, 4),
            number(row.kl, 4),
            interval(row.kl_interval, 4, sign=False),
            number(row.worst, 4),
            row.worst_language,
            style="bold" if row.searched else None,
        )
    return shown


def _mix(alpha: float) -> str:
    return f"objective = {1 - alpha:g} * mean + {alpha:g} * worst"
