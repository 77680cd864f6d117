"""`distaya students`: which smaller model to teach. `distaya shrink`: cut one out of another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from . import options

if TYPE_CHECKING:
    from rich.table import Table as Screen

    from ..students import Made, Row, Table


def students(
    texts: options.Texts,
    budget: Annotated[
        str, typer.Option(help="Parameters in all, such as 1.5B or 500M.", show_default=False)
    ],
    candidates: Annotated[
        list[str] | None,
        typer.Argument(help="Local Hugging Face folders or hub ids.", show_default=False),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Compared with, and cut into shapes that fit.")
    ] = None,
    languages: Annotated[
        str | None, typer.Option(help="Codes with commas between them; all of TEXTS without it.")
    ] = None,
    shapes: Annotated[
        bool, typer.Option("--shapes/--no-shapes", help="Shapes cut out of the teacher, too.")
    ] = True,
    characters: Annotated[
        int, typer.Option(min=1, help="Characters of each language that are scored.")
    ] = 4096,
    seed: Annotated[int, typer.Option(help="Seed of the texts that shapes are cut by.")] = 0,
    device: options.Device = "cpu",
    offline: options.Offline = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Compare CANDIDATES as students: size, tokenizer per language, loss before training."""
    from ..students import students as compare
    from .output import console, print_json
    from .progress import Reporter

    with Reporter(quiet) as reporter:
        found = compare(
            candidates or [],
            texts,
            budget,
            teacher=teacher,
            languages=None if languages is None else _codes(languages),
            shapes=shapes,
            characters=characters,
            seed=seed,
            device=device,
            offline=offline,
            on_step=reporter.on_search,
        )
    if json:
        print_json(found.to_dict())
        return
    screen = console()
    screen.print(size_table(found))
    for row in found.rows:
        if row.error:
            screen.print(f"{row.name}: {row.error}", markup=False, soft_wrap=True)
    for table in (text_table(found), language_table(found)):
        screen.print(table)
    for line in advice(found):
        screen.print(line, markup=False, soft_wrap=True)


def shrink(
    teacher: options.Model,
    out: Annotated[Path, typer.Option(help="Folder to write the student to.", show_default=False)],
    layers: Annotated[
        str | None, typer.Option(help="How many layers stay, such as 6, or which: 0,1,4.")
    ] = None,
    hidden: Annotated[int | None, typer.Option(help="Channels that stay.")] = None,
    intermediate: Annotated[int | None, typer.Option(help="MLP neurons that stay.")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads that stay.")] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="Folder of <lang>.txt, .jsonl or .parquet to see what matters on."),
    ] = None,
    by: Annotated[
        str, typer.Option(help="Width by activation (needs --texts), magnitude or random.")
    ] = "activation",
    layers_by: Annotated[
        str | None,
        typer.Option(help="bi, kl, ppl, angular or l2 on --texts (see layers), or spread evenly."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the texts looked at.")] = 16384,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the windows, and of chance.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an older result of ours.")
    ] = False,
    device: options.Device = "cpu",
    offline: options.Offline = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Cut a student out of a dense TEACHER: fewer layers, channels, neurons or heads."""
    from ..students import make_student
    from .output import print_json
    from .progress import Reporter

    with Reporter(quiet) as reporter:
        made = make_student(
            teacher,
            out,
            layers=None if layers is None else parse_layers(layers),
            hidden=hidden,
            intermediate=intermediate,
            heads=heads,
            texts=texts,
            by=by,
            layers_by=layers_by,
            tokens=tokens,
            window=window,
            seed=seed,
            device=device,
            offline=offline,
            overwrite=overwrite,
            on_step=reporter.on_layers,
        )
    if json:
        print_json(made.to_dict())
    else:
        typer.echo(summary(made))


def parse_layers(text: str) -> int | list[int]:
    """6, or 0,1,4; a comma behind a single number makes it a list of one."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 1 and not parts[-1]:
        parts.pop()
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--layers {text!r} is neither a number nor a list such as 0,1,4")
    numbers = [int(part) for part in parts]
    return numbers if "," in text else numbers[0]


def _codes(text: str) -> list[str]:
    codes = [part.strip() for part in text.split(",") if part.strip()]
    if not codes:
        raise UsageError(f"--languages {text!r} names no language")
    return codes


def summary(made: Made) -> str:
    """What was cut, in a line."""
    from ..students.facts import count_text
    from .output import size

    shape = made.shape
    line = (
        f"{made.out}: {count_text(made.parameters)} parameters, {size(made.bytes)}; layers "
        f"{','.join(map(str, shape.layers))}, hidden {shape.hidden}, MLP {shape.intermediate}, "
        f"{shape.heads} heads"
    )
    if made.norms:
        worst = max(fit.error for fit in made.norms.values())
        line += f"; the worst norm keeps {100 * (1 - worst):.1f} % of its output's square"
    return line


def _numbered(found: Table) -> list[tuple[str, Row]]:
    teacher = [] if found.teacher is None else [("T", found.teacher)]
    return teacher + [(str(n), row) for n, row in enumerate(found.rows, 1)]


def size_table(found: Table) -> Screen:
    """One row per model: its configuration, parameters and bytes."""
    from rich.table import Table as Screen

    from ..students.facts import count_text
    from .output import size

    screen = Screen(title=f"budget {found.budget:,} parameters", title_justify="left")
    for head in ("", "student", "type"):
        screen.add_column(head, overflow="fold")
    heads = ["layers x hidden", "MLP", "heads/kv", "vocab"]
    for head in [*heads, "parameters", "embedding", "weights", "KV/token"]:
        screen.add_column(head, justify="right", no_wrap=head == "parameters")
    screen.add_column("licence", overflow="fold")
    for number, row in _numbered(found):
        if row.facts is None:
            screen.add_row(number, row.name, "cannot be read")
            continue
        x = row.facts
        ends = count_text(x.embedding + x.head)
        screen.add_row(
            number,
            row.name,
            x.model_type,
            f"{x.layers} x {x.hidden}",
            str(x.intermediate),
            f"{x.heads}/{x.kv_heads}",
            f"{x.vocabulary}{' tied' if x.tied else ''}",
            f"{x.parameters:,}",
            ends,
            size(x.weight_bytes),
            size(x.kv_bytes),
            x.licence or "-",
            style="bold" if row.name == found.advice.name else None,
        )
    return screen


def text_table(found: Table) -> Screen:
    """One row per model: its tokenizer, cost and loss on text."""
    from rich.table import Table as Screen

    from .output import number as digits

    screen = Screen()
    screen.add_column("")
    for head in ("fits", "bytes/token", "fewest in", "lossless", "unknown", "tokenizer"):
        screen.add_column(head)
    for head in ("work/byte", "bits/byte", "worst"):
        screen.add_column(head, justify="right")
    alike = {True: "teacher's", False: "another", None: "-"}
    for number, row in _numbered(found):
        text = row.tokenized
        if text is None:
            continue
        few = ", ".join(f"{x.language} {x.bytes_per_token:.2f}" for x in text.worst())
        lossless = min(x.lossless for x in text.languages)
        loss = None if row.loss is None else row.loss.mean
        worst = "-" if row.loss is None else "{} {:.3f}".format(*row.loss.worst)
        screen.add_row(
            number,
            "-" if number == "T" else ("yes" if row.fits else "no"),
            f"{1 / text.tokens_per_byte:.2f}",
            few,
            f"{100 * lossless:.0f} %",
            f"{100 * max(x.unknown for x in text.languages):.1f} %",
            alike[True if number == "T" else row.same_tokenizer],
            digits(row.compute, 2),
            digits(loss),
            worst,
            style="bold" if row.name == found.advice.name else None,
        )
    return screen


def language_table(found: Table) -> Screen:
    """One row per language: bytes (and tokens per character) of each tokenizer, bits of each loss.

    Tokenizers that give the same tokens share a column.
    """
    from rich.table import Table as Screen

    tokenizers: dict[str, tuple[list[str], Row]] = {}
    for number, row in _numbered(found):
        if row.tokenized is not None:
            tokenizers.setdefault(row.tokenized.digest, ([], row))[0].append(number)
    scored = [(number, row) for number, row in _numbered(found) if row.loss is not None]
    screen = Screen(title="bytes/token (tokens/character), bits/byte", title_justify="left")
    screen.add_column("lang")
    for names, _ in tokenizers.values():
        screen.add_column(f"tokens {','.join(names)}", justify="right")
    for number, _ in scored:
        screen.add_column(f"bits {number}", justify="right")
    for at, lang in enumerate(found.languages):
        each = [row.tokenized.languages[at] for _, row in tokenizers.values()]
        screen.add_row(
            lang,
            *(f"{x.bytes_per_token:.2f} ({x.per_character:.2f})" for x in each),
            *(f"{row.loss.languages[lang]:.3f}" for _, row in scored),
        )
    return screen


def advice(found: Table) -> list[str]:
    """The choice in sentences, and how to make it where it is not there yet."""
    lines = [f"note: {note}" for note in found.notes]
    best = found[found.advice.name]
    lines.append(f"Take {best.name}.")
    lines += [f"  {reason}" for reason in found.advice.reasons]
    lines += [f"  {change}" for change in found.advice.changes]
    if best.shape is not None:
        shape = best.shape
        lines.append(
            f"distaya shrink {found.teacher.name} --out STUDENT --texts TEXTS --layers "
            f"{','.join(map(str, shape.layers))}{',' * (len(shape.layers) == 1)} --hidden "
            f"{shape.hidden} --intermediate {shape.intermediate} --heads {shape.heads}"
        )
    return lines
