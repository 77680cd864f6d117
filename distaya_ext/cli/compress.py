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
    embed_bits: Annotated[
        int | None, typer.Option(help="8: embedding and head as int8, one scale per row.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="auto, dense, pack-quantized (stock readers) or distaya (only ours)."),
    ] = None,
    calib: Annotated[
        Path | None, typer.Option(help="Folder of <lang>.txt, .jsonl or .parquet to calibrate on.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Calibration tokens over all languages.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per calibration window.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the choice of windows.")] = None,
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
        str | None, typer.Option(help="Decoder layers to leave out, from 0, such as 3,5.")
    ] = None,
    max_ram: Annotated[
        str | None, typer.Option(help="Memory to stay within, such as 8GiB.")
    ] = None,
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
        drop_layers=parse_layers(drop_layers),
        max_ram=max_ram,
        calibration={
            "path": calib,
            "tokens": tokens,
            "window": window,
            "seed": seed,
            "weights": parse_weights(language_weights) if language_weights else None,
            "quotas": parse_quotas(quota) if quota else None,
        },
    )
    if group is not None and whole.bits is None:
        raise UsageError("--group says how weights share a scale, so it needs --bits")
    from ..compress import compress as run
    from ..compress.settings import from_recipe
    from .output import print_json
    from .progress import Reporter

    learns = from_recipe(whole).statistic is not None
    if learns and whole.calibration.path is None:
        raise UsageError(f"method {whole.method} learns from text: give a folder with --calib")
    with Reporter(quiet) as reporter:
        if calib is not None and not learns:
            reporter.say(f"note: method {whole.method} learns nothing from text; --calib is unused")
        report = run(
            whole.model,
            out,
            whole,
            on_event=reporter.on_event,
            overwrite=overwrite,
            device=device,
            offline=offline,
        )
        if report.dropped_layers:
            left = len(report.source_layers)
            reporter.say(f"{len(report.dropped_layers)} layers left out, {left} written")
        reporter.say(
            f"{len(report.modules)} matrices, {100 * report.sparsity:.1f} % zeros, "
            f"{report.bits_per_weight:.2f} bits per weight ({report.format}), "
            f"{report.seconds:.1f} s"
        )
    if json:
        print_json({"out": str(out), **report.summary()})
    else:
        typer.echo(str(out))


def parse_layers(text: str | None) -> list[int] | None:
    """The layers that "3,5" names; None stays None."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 7 for part in parts):
        raise UsageError(f"--drop-layers {text!r} is no list of layer numbers such as 3,5")
    return [int(part) for part in parts]


def build_recipe(file: Path | None, **flags: Any) -> Recipe:
    """The recipe of a file with the flags that were given laid over it."""
    from ..recipe import Recipe, parse_sparsity, read_fields

    fields = read_fields(file) if file is not None else {}
    given = {name: value for name, value in flags.items() if value is not None}
    spec = {
        k: str(v) if k == "path" else v
        for k, v in given.pop("calibration").items()
        if v is not None
    }
    if spec:
        inner = fields.get("calibration") or {}
        if not isinstance(inner, dict):
            raise UsageError(
                f"recipe {file}: calibration must be a mapping, not {type(inner).__name__}"
            )
        fields["calibration"] = {**inner, **spec}
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
