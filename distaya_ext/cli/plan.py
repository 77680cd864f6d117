"""`distaya plan`: what a compression will take and give, before it is started."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options, scaling
from .compress import build_recipe, check_flags
from .languages import parse_quotas, parse_weights

if TYPE_CHECKING:
    from rich.table import Table

    from ..planning import Plan


def plan(
    model: Annotated[
        str | None,
        typer.Argument(help="Local Hugging Face folder or hub id; the recipe may name it instead."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML recipe; flags given beside it win.")
    ] = None,
    calib: Annotated[
        Path | None, typer.Option(help="Folder of <lang>.txt, .jsonl or .parquet to calibrate on.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the output would go: its disk is looked at.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="As compress takes it.")] = None,
    sparsity: Annotated[str | None, typer.Option(help="0.5 or N:M, as compress.")] = None,
    quality: Annotated[str | None, typer.Option(help="plain, default or high.")] = None,
    bits: Annotated[int | None, typer.Option(help="Quantise to 2..8 bits.")] = None,
    group: Annotated[int | None, typer.Option(help="Inputs per scale: 32, 64, 128 or 0.")] = None,
    embed_bits: options.EmbedBits = None,
    format: Annotated[
        str | None, typer.Option(help="auto, dense, pack-quantized, distaya.")
    ] = None,
    tokens: options.CalibTokens = None,
    window: options.CalibWindow = None,
    seed: options.Seed = None,
    language_weights: Annotated[str | None, typer.Option(help="As compress takes it.")] = None,
    quota: Annotated[
        list[str] | None, typer.Option(help="Calibration tokens of a language: en=4096.")
    ] = None,
    drop_layers: Annotated[str | None, typer.Option(help="As compress takes it.")] = None,
    heal: Annotated[int | None, typer.Option(min=1, help="Training steps afterwards.")] = None,
    evaluate: Annotated[Path | None, typer.Option(help="Texts to measure the result on.")] = None,
    max_ram: options.MaxRam = None,
    max_vram: options.MaxVram = None,
    no_rehearsal: Annotated[
        bool, typer.Option("--no-rehearsal", help="Run no layer; then no time is told.")
    ] = False,
    ranks: Annotated[
        str | None,
        typer.Option(help="Also as so many processes under torchrun: 8 or 1,2,8 (simulated)."),
    ] = None,
    wire: Annotated[
        str | None,
        typer.Option(help="What passes into each of them: 10GB/s; else measured on this host."),
    ] = None,
    device: options.Device = "cpu",
    offline: options.Offline = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Say what compressing MODEL takes (memory, disk, time) and gives; exit 5 when it cannot fit.

    Nothing is written. The most expensive layer is run once on few tokens to tell the time.
    """
    whole = build_recipe(
        recipe,
        model=model,
        method=method,
        sparsity=sparsity,
        quality=quality,
        bits=bits,
        group=group,
        embed_bits=embed_bits,
        format=format,
        drop_layers=drop_layers,
        max_ram=max_ram,
        max_vram=max_vram,
        heal={"steps": heal},
        evaluate={"path": evaluate},
        calibration={
            "path": calib,
            "tokens": tokens,
            "window": window,
            "seed": seed,
            "weights": parse_weights(language_weights) if language_weights else None,
            "quotas": parse_quotas(quota) if quota else None,
        },
    )
    check_flags(whole, group)
    from ..planning import plan as run
    from .output import print_json

    found = run(
        whole.model,
        whole,
        out=out,
        device=device,
        rehearse=not no_rehearsal,
        offline=offline,
        ranks=_numbers(ranks),
        network=wire,
    )
    if json:
        print_json(found.to_dict())
    else:
        show(found)


def _numbers(text: str | None) -> list[int]:
    from ..errors import UsageError

    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"--ranks takes numbers of processes such as 8 or 1,2,8, not {text!r}")
    return list(dict.fromkeys(map(int, parts)))


def show(found: Plan) -> None:
    """The plan as tables and sentences."""
    from .output import console

    screen = console()
    screen.print(_takes(found))
    screen.print(_gives(found))
    if found.rivals:
        screen.print(_rivals(found))
    if found.scaling is not None:
        for told in scaling.tables(found.scaling):
            screen.print(told)
    for rank in found.ranks:
        screen.print(f"few tokens: {rank.sentence}")
    for notice in found.notices:
        screen.print(f"note: {notice}")


def _takes(found: Plan) -> Table:
    from rich.table import Table

    from .output import size

    table = Table(title=f"What compressing {Path(found.model).name} takes", title_justify="left")
    table.add_column("")
    table.add_column("most", justify="right")
    table.add_column("of it")
    memory = found.memory
    spills = "; activations wait on the disk" if memory.spilled else ""
    table.add_row("memory", size(memory.peak), f"decided by: {memory.worst}{spills}")
    if found.vram is not None:
        away = "; activations wait in the host's memory" if found.away else ""
        table.add_row("GPU memory", size(found.vram), f"counted, not measured{away}")
    disk = ", ".join(f"{name} {size(part)}" for name, part in found.disk.items() if part)
    table.add_row("disk", size(sum(found.disk.values())), disk)
    if found.time is not None:
        low, high = span(found.time.low), span(found.time.high)
        steps = ", ".join(f"{name} {span(t)}" for name, t in found.time.steps.items())
        table.add_row("time", f"{low} to {high}", f"{steps}; {found.time.based_on}")
    return table


def _gives(found: Plan) -> Table:
    from rich.table import Table

    from .output import size

    title = f"What it gives ({found.format}, {size(found.source)} before)"
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    for head in ("bytes", "bits per weight"):
        table.add_column(head, justify="right")
    table.add_column("of it")
    for name, part in found.parts.items():
        holds = ", ".join(f"{kind} {size(count)}" for kind, count in part.holds.items())
        table.add_row(name, size(part.bytes), f"{part.bits_per_weight:.2f}", holds)
    table.add_section()
    beside = f"{found.bits_per_weight_layers:.2f} without embeddings, head and norms"
    table.add_row("all", size(found.output), f"{found.bits_per_weight:.2f}", beside)
    return table


def _rivals(found: Plan) -> Table:
    from rich.table import Table

    from .output import size

    table = Table(title="For the same bytes you could have", title_justify="left")
    table.add_column("recipe")
    for head in ("bytes", "of these", "weights kept", "bits of each"):
        table.add_column(head, justify="right")
    for rival in found.rivals:
        kept, bits = f"{100 * rival.kept:.0f} %", f"{rival.bits}"
        table.add_row(rival.recipe, size(rival.bytes), f"{100 * rival.ratio:.1f} %", kept, bits)
    return table


def span(seconds: float) -> str:
    """Seconds in the unit that fits."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
