"""`distaya layers`: what each decoder layer does, and which ones a model can best do without."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from ..ranks import team
from . import options

if TYPE_CHECKING:
    from rich.table import Table

    from ..influence.choose import Choice
    from ..influence.scores import Scores
    from ..influence.spec import DropSpec


def layers(
    model: options.Model,
    texts: options.Texts,
    scores: Annotated[
        str, typer.Option(help="Any of bi, angular, l2, ppl, kl, separated by commas.")
    ] = "bi,angular,l2,ppl,kl",
    drop: Annotated[
        str | None,
        typer.Option(help="How many layers shall go, such as 4 or 25%; a quarter without it."),
    ] = None,
    protect: Annotated[
        str | None, typer.Option(help="Layers that stay, such as 0,1,-1; negative from the end.")
    ] = None,
    greedy: Annotated[
        bool,
        typer.Option(
            "--greedy/--one-shot", help="Measure ppl and kl anew after every layer that went."
        ),
    ] = True,
    parts: Annotated[
        bool, typer.Option("--parts", help="Score attention and MLP of each layer as well.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to measure on, in all.")] = 16384,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of windows.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="PNG to draw the scores to, per layer and language.")
    ] = None,
    max_ram: Annotated[
        str | None, typer.Option(help="Memory to stay within, such as 8GiB.")
    ] = None,
    device: options.Device = "cpu",
    offline: options.Offline = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Score the decoder layers of MODEL, per language, and say which ones to drop."""
    if plot is not None:
        from ..influence.plot import need

        need()  # before hours of work
        if plot.suffix.lower() != ".png" or not plot.parent.is_dir():
            raise UsageError(f"--plot {plot} is not a .png file in a folder that exists")
    from ..checkpoint import open_checkpoint
    from ..influence.choose import Study, check_scores, given, how_many
    from ..recipe import CalibrationSpec, parse_size
    from .output import print_json
    from .progress import Reporter

    asked = check_scores([part.strip() for part in scores.split(",") if part.strip()])
    spec = CalibrationSpec(tokens=tokens, window=window, seed=seed)
    wanted = drops(drop, protect, greedy)
    checkpoint = open_checkpoint(model, offline=offline)
    depth = checkpoint.config.num_hidden_layers
    specs = [one for score in asked if (one := wanted(score, depth)) is not None]
    count = how_many(specs[0], depth)[0] if specs else 1
    run = count if "angular" in asked else 1
    first = team().first
    with Reporter(quiet or not first) as reporter:
        windows = given(texts, checkpoint, spec)
        reporter.say(f"{windows.tokens} tokens in windows of {window}, {depth} layers")
        study = Study(checkpoint, windows, asked, run=run, parts=parts)
        found, choices = study.go(
            specs,
            device=device,
            on_event=reporter.on_event,
            max_ram=None if max_ram is None else parse_size(max_ram),
        )
    if not first:  # which has found the same
        return
    best = min(choices, key=lambda choice: float(choice.loss.kl.mean()), default=None)
    command = None if best is None else advice(model, best.dropped, depth)
    if plot is not None:
        from ..influence.plot import draw

        draw(found, plot, title=f"Layers of {model}", dropped=best.dropped if best else None)
    if json:
        told = {"model": model, "layers": depth, **found.to_dict()}
        told["rankings"] = {score: found.ranking(score) for score in asked}
        told["choices"] = [choice.to_dict() for choice in choices]
        told["recommended"] = None if best is None else best.dropped
        told["command"] = command
        print_json(told)
        return
    _show(found, choices, best, command, checkpoint.config, asked)
    if plot is not None:
        typer.echo(str(plot))


def drops(drop: str | None, protect: str | None, greedy: bool) -> Any:
    """What the flags ask for as a function (score, layers of the model) -> DropSpec, or None where
    a model of one layer has none to spare. UsageError for flags that say nothing of the kind.
    """
    from ..influence.spec import DropSpec, parse_drop

    more: dict[str, Any] = {"greedy": greedy}
    if protect is not None:
        try:
            more["protect"] = [int(part) for part in protect.split(",")]
        except ValueError:
            raise UsageError(f"--protect takes layers as 0,1,-1, not {protect!r}") from None
    asked = None if drop is None else parse_drop(drop, "--drop")
    if isinstance(asked, list):
        raise UsageError(f"--drop takes how many layers shall go, such as 4 or 25%, not {drop!r}")

    def spec(score: str, depth: int) -> DropSpec | None:
        if asked is not None:
            return DropSpec(count=asked.count, share=asked.share, score=score, **more)
        return DropSpec(count=max(1, depth // 4), score=score, **more) if depth > 1 else None

    return spec


def advice(model: str, dropped: list[int], depth: int) -> str:
    """The command that leaves these layers out."""
    out = f"{Path(model).name}-{depth - len(dropped)}-layers"
    listed = ",".join(map(str, dropped)) + "," * (len(dropped) == 1)  # "3" alone is how many
    return shlex.join(["distaya", "compress", model, "--drop-layers", listed, "--out", out])


def _show(
    found: Scores,
    choices: list[Choice],
    best: Choice | None,
    command: str | None,
    config: Any,
    asked: list[str],
) -> None:
    from .output import console

    screen = console()
    screen.print(score_table(found, config, asked))
    for score in asked:
        order = ", ".join(map(str, found.ranking(score)))
        screen.print(f"{score}, least first: {order}", markup=False, soft_wrap=True)
    if found.runs is not None:
        first = found.firsts[int(found.runs.mean(axis=1).argmin())]
        last = found.firsts[int(found.runs_last.mean(axis=1).argmin())]
        screen.print(
            f"{found.run} consecutive layers of least angular distance begin at {first} (by the "
            f"last token of each window: {last})",
            markup=False,
        )
    if best is None:
        return
    screen.print(drop_table(choices, best))
    for notice in best.notices:
        screen.print(f"note: {notice}", markup=False, soft_wrap=True)
    screen.print(f"recommended: drop {', '.join(map(str, best.dropped))}", markup=False)
    typer.echo(command)


def score_table(found: Scores, config: Any, asked: list[str]) -> Table:
    """A row per layer (and part): every score's mean over languages and its worst language."""
    from rich.table import Table

    from ..influence.scores import MEANING

    heads = "\n".join(f"{score}: {MEANING[score]}" for score in asked)
    shown = Table(title=f"Means over languages, and the worst one\n{heads}", title_justify="left")
    shown.add_column("layer")
    kinds = list(getattr(config, "layer_types", None) or [])
    mixed = len(set(kinds)) > 1
    if mixed:
        shown.add_column("attention")
    for score in asked:
        shown.add_column(score, justify="right")
        shown.add_column("worst", justify="right", style="dim")
    order = sorted(range(len(found.candidates)), key=lambda i: (found.candidates[i].layer, i))
    for i in order:
        who = found.candidates[i]
        whole = who.kind == "layer"
        cells = [str(who.layer) if whole else f"  {who.kind}"]
        if mixed:
            cells.append(kinds[who.layer].removesuffix("_attention") if whole else "")
        for score in asked:
            worst, value = found.worst(score, i)
            cells += [f"{found.mean(score)[i]:.4f}", f"{worst} {value:.4f}"]
        shown.add_row(*cells)
    return shown


def drop_table(choices: list[Choice], best: Choice) -> Table:
    """What each score would drop and what the model without it loses, the recommended one bold."""
    from rich.table import Table

    from ..influence.scores import REMOVAL
    from .output import number

    shown = Table(
        title=f"{len(best.dropped)} layers left out: losses on these texts, nats per token",
        title_justify="left",
    )
    shown.add_column("by")
    shown.add_column("layers")
    for head in ("KL", "delta NLL", "worst language"):
        shown.add_column(head, justify="right")
    for choice in choices:
        spec: DropSpec = choice.spec
        greedy = spec.score in REMOVAL and spec.greedy
        went = [", ".join(map(str, one.went)) for one in choice.rounds]
        lang, value = choice.loss.worst
        shown.add_row(
            f"{spec.score}, greedy" if greedy else spec.score,
            ", then ".join(went) if greedy else went[0],
            number(float(choice.loss.kl.mean()), 4),
            number(float(choice.loss.dnll.mean()), 4, sign=True),
            f"{lang} {number(value, 4, sign=True)}",
            style="bold" if choice is best else None,
        )
    return shown
