"""`distaya compress`: a model in, a smaller one out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from . import options
from .languages import parse_quotas, parse_weights

if TYPE_CHECKING:
    from ..recipe import Recipe


def compress(
    out: Annotated[
        Path, typer.Option(help="Folder to write the compressed model to.", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Argument(help="Local Hugging Face folder or hub id; the recipe may name it instead."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="sparsegpt, wanda, magnitude, ria, dass, gptq, rtn, dense.")
    ] = None,
    sparsity: Annotated[
        str | None, typer.Option(help="Share to remove such as 0.5, or N:M kept such as 2:4.")
    ] = None,
    quality: Annotated[
        str | None,
        typer.Option(help="plain (the published sweep), default or high, for sparsegpt and gptq."),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Quantise to 2..8 bits.")] = None,
    group: Annotated[
        int | None, typer.Option(help="Inputs per scale: 32, 64, 128 or 0 for the row.")
    ] = None,
    embed_bits: options.EmbedBits = None,
    format: Annotated[
        str | None,
        typer.Option(help="auto, dense, pack-quantized (stock readers) or distaya (only ours)."),
    ] = None,
    calib: Annotated[
        Path | None, typer.Option(help="Folder of <lang>.txt, .jsonl or .parquet to calibrate on.")
    ] = None,
    tokens: options.CalibTokens = None,
    window: options.CalibWindow = None,
    seed: options.Seed = None,
    language_weights: Annotated[
        str | None,
        typer.Option(help="equal, proportional, worst, a YAML file {lang: weight} or en=2,sw=5."),
    ] = None,
    quota: Annotated[
        list[str] | None,
        typer.Option(help="Calibration tokens of one language, such as en=4096; repeatable."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML recipe; flags given beside it win.")
    ] = None,
    drop_layers: Annotated[
        str | None,
        typer.Option(help="How many decoder layers go by score (4 or 25%), or which (3,5 or 3,)."),
    ] = None,
    heal: Annotated[
        int | None,
        typer.Option(min=1, help="Training steps against the model before; a recipe says more."),
    ] = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(help="Folder of texts to compare the result with the model before on."),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget what a run that was stopped has kept.")
    ] = False,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Stop (exit 4) at the first module whose numbers are bad."),
    ] = False,
    parts: options.Parts = None,
    spill_dir: options.SpillDir = None,
    max_ram: options.MaxRam = None,
    max_vram: options.MaxVram = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an older result of ours.")
    ] = False,
    device: options.Device = "cpu",
    offline: options.Offline = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Compress MODEL layer by layer and write it to OUT, with its recipe and losses."""
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
            "parts": parts,
            "weights": parse_weights(language_weights) if language_weights else None,
            "quotas": parse_quotas(quota) if quota else None,
        },
    )
    learns = check_flags(whole, group)
    from ..compress import compress as run
    from .output import print_json
    from .remember import compressed
    from .training import TrainReporter

    by_score = not isinstance(whole.drop_layers, list)
    with TrainReporter(quiet) as reporter:
        if calib is not None and not (learns or by_score or _heals_on_calib(whole)):
            reporter.say(f"note: method {whole.method} learns nothing from text; --calib is unused")
        report = run(
            whole.model,
            out,
            whole,
            on_event=reporter.on_event,
            on_progress=reporter.on_progress,
            overwrite=overwrite,
            restart=restart,
            device=device,
            offline=offline,
            strict=strict,
            spill=spill_dir,
        )
        if report.dropped_layers:
            left = len(report.source_layers)
            reporter.say(f"{len(report.dropped_layers)} layers left out, {left} written")
        reporter.say(written(report.summary(), report.seconds))
    summary = report.summary()
    held_out = None if whole.evaluate is None else whole.evaluate.path
    compressed(out, whole.model, summary, (whole.calibration.path, held_out))
    if json:
        print_json({"out": str(out), **summary})
    else:
        show_evaluations(report)
        typer.echo(str(out))
    if whole.chained:
        report.check_gate()


def check_flags(recipe: Recipe, group: int | None) -> bool:
    """UsageError for flags that only a command line can leave out or give too many of; whether the
    method learns from text.
    """
    from ..compress.settings import from_recipe

    if group is not None and recipe.bits is None:
        raise UsageError("--group says how weights share a scale, so it needs --bits")
    learns = from_recipe(recipe).statistic is not None
    if learns and recipe.calibration.path is None:
        raise UsageError(f"method {recipe.method} learns from text: give a folder with --calib")
    return learns


def _heals_on_calib(recipe: Recipe) -> bool:
    return recipe.heal is not None and recipe.heal.path is None


def written(summary: dict[str, Any], seconds: float) -> str:
    """What was compressed, in a line."""
    totals = summary["totals"]
    return (
        f"{totals['modules']} matrices, {100 * totals['sparsity']:.1f} % zeros, "
        f"{totals['bits_per_weight']:.2f} bits per weight ({summary['size']['format']}), "
        f"{seconds:.1f} s"
    )


def show_evaluations(report: Any) -> None:
    """The languages after every step of a chain, where it evaluates."""
    if evaluations := getattr(report, "evaluations", None):
        from .output import chain_table, console

        console().print(chain_table(evaluations))


def build_recipe(file: Path | None, **flags: Any) -> Recipe:
    """The recipe of a file with the flags that were given laid over it."""
    from ..recipe import Recipe, parse_sparsity, read_fields

    fields = read_fields(file) if file is not None else {}
    given = {name: value for name, value in flags.items() if value is not None}
    for name in ("calibration", "heal", "evaluate"):
        spec = given.pop(name, {})
        fields |= _laid_over(name, fields.get(name), spec, file)
    if "sparsity" in given:
        # One flag stands for two fields: the one it does not set must not survive from the file.
        fields = {k: v for k, v in fields.items() if k not in ("sparsity", "nm")}
        given |= parse_sparsity(given.pop("sparsity"))
    fields |= given
    if "model" not in fields:
        raise UsageError("say which model: the first argument, or model: in the recipe")
    if "method" not in fields and "bits" in fields and not {"sparsity", "nm"} & fields.keys():
        fields["method"] = "gptq"
    asked = {"method", "sparsity", "nm", "bits", "modules"} & fields.keys()
    if not asked and {"embed_bits", "drop_layers"} & fields.keys():
        fields["method"] = "dense"
    return Recipe(**fields)


def _laid_over(name: str, inner: Any, flags: dict[str, Any], file: Path | None) -> dict[str, Any]:
    """{name: what a recipe's file says of it, with the flags over it}; nothing without flags."""
    from ..recipe_chain import read_evaluate, read_heal

    given = {k: str(v) if k == "path" else v for k, v in flags.items() if v is not None}
    if not given:
        return {}
    inner = {"heal": read_heal, "evaluate": read_evaluate}.get(name, lambda value: value)(
        inner or {}
    )
    if not isinstance(inner, dict):
        raise UsageError(f"recipe {file}: {name} must be a mapping, not {type(inner).__name__}")
    return {name: {**inner, **given}}
