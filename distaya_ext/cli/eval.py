"""`distaya eval`: what each language lost."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import UsageError
from . import options


def evaluate(
    model: options.Model,
    texts: options.Texts,
    against: Annotated[
        str | None, typer.Option(help="The model before compression; compared token by token.")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Score this many tokens at most, the same in every language."),
    ] = None,
    lines: Annotated[
        bool,
        typer.Option(
            "--lines", help="Parallel texts: line i is the same sentence in every language."
        ),
    ] = False,
    max_worst_ppl_ratio: Annotated[
        float | None,
        typer.Option(
            help="Exit 6 when the worst language's perplexity grew by more than this factor."
        ),
    ] = None,
    max_gap: Annotated[
        float | None,
        typer.Option(
            help="Exit 6 when the worst language lost this many nats more than the median."
        ),
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    exact: options.Exact = False,
    offline: options.Offline = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure MODEL per language, worst first; with --against, what compression changed."""
    if against is None and (max_worst_ppl_ratio is not None or max_gap is not None):
        raise UsageError(
            "--max-worst-ppl-ratio and --max-gap compare two models, so they need --against"
        )
    if lines and tokens is not None:
        raise UsageError("--tokens cuts windows and has no meaning with --lines")

    from ..evaluate import evaluate as compare
    from .output import console, evaluation_table, print_json, verdict
    from .progress import Reporter

    with Reporter(quiet) as reporter:
        found = compare(
            model,
            texts,
            against=against,
            window=window,
            tokens=tokens,
            per_line=lines,
            dtype=dtype,
            device=device,
            offline=offline,
            exact=exact,
            on_progress=reporter.on_progress,
        )
    if json:
        print_json(found.to_dict())
    else:
        out = console()
        out.print(evaluation_table(found))
        out.print(verdict(found), markup=False)
        out.print(found.to_dict()["notes"][-1], markup=False, style="dim")
    found.gate(max_worst_ppl_ratio=max_worst_ppl_ratio, max_gap=max_gap)
