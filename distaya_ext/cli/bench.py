"""`distaya bench`: how fast packed weights run on this machine, beside torch in the same run."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import UsageError
from . import options

QUICK = {
    "shapes": ["aya-8b gate/up", "aya-8b down"],
    "kinds": ["int4", "int4-2:4", "int4-mask"],
    "tokens": [1, 16, 128],
}


class Group(TyperGroup):
    """`distaya bench` alone means `distaya bench kernels`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
            args = ["kernels", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=Group,
    help="Measure speed here: kernels (the default), one decoder layer, or a whole model.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("kernels")
def kernels(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Part of a name ('aya-8b', 'down') or ROWSxCOLS; may be repeated."),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="int4, int3, int8, int4-2:4, int4-mask or int4-out; may be repeated."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Numbers of tokens at once, as 1,16,128.")
    ] = None,
    threads: Annotated[
        str | None, typer.Option(help="Numbers of threads, as 1,2; torch's own without it.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Every Aya shape, kind and number of tokens: hours.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="The default: two matrices of Aya-8B, under a minute.")
    ] = False,
    device: options.Device = "cpu",
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Time y = x W^T on packed weights beside torch's bf16 and int4 products, out of cache.

    Limits are measured in the same run: reading memory, and the peak of the dot products.
    """
    if full and quick:
        raise UsageError("--full and --quick exclude each other")
    from ..measure import kernels as source
    from ..measure import report
    from .output import console, print_json
    from .progress import Reporter

    with Reporter(quiet) as reporter:
        plan = _plan(shape, kind, tokens, threads, full, device)
        result = source.measure(
            plan,
            on_note=reporter.say,
            on_row=lambda row: None if row.kind is None else reporter.say(_line(row)),
        )
    if json:
        print_json(report.kernels_json(result))
        return
    out = console()
    for table in report.kernel_tables(result.rows):
        out.print(table)
    _tell_contended(out, len(result.contended), len(result.rows))


@app.command("layer")
def layer(
    size: Annotated[str, typer.Option(help="aya-8b, aya-32b or tiny-aya.")] = "aya-8b",
    kind: Annotated[list[str] | None, typer.Option(help="As of kernels; may be repeated.")] = None,
    threads: Annotated[
        str | None, typer.Option(help="Numbers of threads, as 1,2; torch's own without it.")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Full-precision activations too.")] = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Decode through one decoder layer of an Aya shape, packed beside dense bf16, out of cache."""
    from ..measure import layer as source
    from ..measure import report, rulers, shapes
    from .output import console, print_json

    if size not in shapes.MODELS:
        raise UsageError(f"size {size!r} is none of {', '.join(shapes.MODELS)}")
    kinds = rulers.kinds_of(shapes.of_model(size)[0], kind or QUICK["kinds"])
    modes = rulers.MODES if exact else rulers.MODES[:1]
    rows = source.measure(size, kinds, _threads(threads), modes=modes)
    if json:
        print_json(report.layer_json(rows))
        return
    out = console()
    out.print(report.layer_table(rows))
    _tell_contended(out, sum(row.contended for row in rows), len(rows))


@app.command("model")
def model(
    path: options.Model,
    against: Annotated[
        str | None,
        typer.Option(
            help="Dense model to run beside it; a packed one without it runs beside its own "
            "weights made dense."
        ),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    new: Annotated[int, typer.Option(min=1, help="Tokens decoded after it.")] = 32,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each; medians are kept.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="torch's own without it.")] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Full-precision activations on the CPU too.")
    ] = False,
    keep: Annotated[
        bool,
        typer.Option("--report", help="Keep the result in MODEL's folder and its report."),
    ] = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    strict: options.StrictKernels = False,
    offline: options.Offline = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Tokens per second of prefill and decode, and resident bytes, beside the dense model."""
    if keep:
        from ..report import check_stores

        check_stores(path)
    from ..checkpoint.whole import quiet_transformers
    from ..measure import model as source
    from ..measure import report
    from .output import console, kernels_told, print_json
    from .progress import Reporter
    from .remember import benched

    setting = source.Setting(prompt, new, runs, threads, device, dtype, exact, offline)
    with Reporter(quiet) as reporter, quiet_transformers(), kernels_told(strict):
        result = source.measure(path, against, setting, note=reporter.say)
    benched(result, path, against, setting)
    if keep:
        _store(path, report.model_json(result))
    if json:
        print_json(report.model_json(result))
        return
    out = console()
    out.print(report.model_table(result))
    _tell_contended(out, sum(row.contended for row in result.rows), len(result.rows))


def _store(path: str, value: dict[str, Any]) -> None:
    from pathlib import Path

    from ..report import REPORT, store
    from .output import console
    from .report import run_before, tell

    value = value | {"before": run_before("bench model")}
    kept = store(Path(path).expanduser(), "speed", value)
    tell(console(err=True), kept.with_name(REPORT))


def _line(row: Any) -> str:
    best = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row.ratios.items())
    return (
        f"{row.shape}, {_count(row.threads, 'thread')}, {_count(row.tokens, 'token')}, {row.name}: "
        f"{row.seconds * 1e3:.3g} ms, {best}"
    )


def _tell_contended(out: Any, count: int, rows: int) -> None:
    if count:
        out.print(
            f"{count} of {rows} rows are contended: something else ran beside them, and they say "
            "little."
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _plan(
    shape: list[str] | None,
    kind: list[str] | None,
    tokens: str | None,
    threads: str | None,
    full: bool,
    device: str,
) -> Any:
    from ..device import find_device
    from ..measure import shapes
    from ..measure.kernels import Plan
    from ..measure.rulers import kinds_of
    from ..ops import pack

    kinds = kind or (list(pack.KINDS) if full else QUICK["kinds"])
    found = shapes.find(shape or (list(shapes.MODELS) if full else QUICK["shapes"]))
    if kind is None and any(s.head for s in found) and "int8" not in kinds:
        kinds = [*kinds, "int8"]
    for each in found:
        kinds_of(each, kinds)  # refuses unknown kinds before any work
    counts = numbers("--tokens", tokens) if tokens else None
    if device == "cpu":
        asked = _threads(threads)
    elif threads:
        raise UsageError("--threads is for the CPU; a GPU uses all it has")
    else:
        asked = [1]
    return Plan(
        shapes=found,
        kinds=kinds,
        tokens=counts or (list(shapes.TOKENS) if full else QUICK["tokens"]),
        threads=asked,
        device=find_device(device, kernels=True),
    )


def _threads(text: str | None) -> list[int]:
    import torch

    return numbers("--threads", text) if text else [torch.get_num_threads()]


def numbers(flag: str, text: str, most: int = 1 << 20) -> list[int]:
    """ "1,16,128" -> [1, 16, 128]; UsageError for anything that is no list of positive numbers."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{flag} takes numbers as 1,16,128, not {text!r}") from None
    for value in found:
        if not 0 < value <= most:
            raise UsageError(f"{flag} takes numbers from 1 to {most}, not {value}")
    return found
