"""What the user sees: consoles, tables, numbers. Results go to stdout, the rest to stderr."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import NumericsError
from ..evaluate import Evaluation, LanguageResult

# Written to a file or pipe, a table must not be cut to the 80 columns rich assumes.
_PLAIN_WIDTH = 160


def console(*, err: bool = False) -> Console:
    """A console on stdout or stderr, with room for whole rows where there is no terminal."""
    stream = sys.stderr if err else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else _PLAIN_WIDTH, highlight=False)


@contextmanager
def kernels_told(strict: bool = False) -> Iterator[None]:
    """Inside, modules that run slower than they could are told of on stderr; NumericsError when
    strict.
    """
    from ..runtime import SlowKernelWarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, SlowKernelWarning):
            console(err=True).print(f"note: {message}", markup=False, soft_wrap=True)
        else:
            before(message, category, *rest, **more)

    with warnings.catch_warnings():
        before, warnings.showwarning = warnings.showwarning, show
        warnings.simplefilter("error" if strict else "always", SlowKernelWarning)
        try:
            yield
        except SlowKernelWarning as slow:
            raise NumericsError(f"{slow}; --strict takes that for a failure") from None


def print_json(value: Any) -> None:
    """One JSON object on stdout; NaN is refused, since JSON has none."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number in the given digits, or a dash where there is none."""
    return "-" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def interval(pair: tuple[float, float] | None, digits: int = 3, sign: bool = True) -> str:
    """[low, high], or a dash."""
    return (
        "-"
        if pair is None
        else f"[{number(pair[0], digits, sign)}, {number(pair[1], digits, sign)}]"
    )


def size(count: float) -> str:
    """Bytes in the unit that fits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def evaluation_table(found: Evaluation) -> Table:
    """Languages worst first, English marked, the mean over tokens last."""
    table = Table(title=_title(found), title_justify="left")
    table.add_column("lang")
    heads = ["samples", "tokens", "NLL"]
    if found.compared:
        heads = ["samples", "tokens", "NLL before", "after", "delta", "95 % CI", "PPL ratio"]
        heads += ["bits/byte", "KL", "KL p99", "top-1 same"]
    else:
        heads += ["95 % CI", "PPL", "bits/byte"]
    if found.written is not None:
        heads.append("wrong script")
    for head in heads:
        table.add_column(head, justify="right")
    for row in found.languages:
        cells = _compared(row) if found.compared else _alone(row)
        if found.written is not None:
            cells.append(_scripts(row, found.compared))
        table.add_row(row.language, *cells, style="bold" if row.language == "en" else None)
    table.add_section()
    tokens = sum(row.tokens for row in found.languages)
    samples = sum(row.samples for row in found.languages)
    if found.compared:
        delta = found.nll - found.base_nll
        cells = [number(found.base_nll), number(found.nll), number(delta, sign=True)]
    else:
        cells = [number(found.nll)]
    table.add_row("all", str(samples), str(tokens), *cells)
    return table


def chain_table(evaluations: dict[str, dict[str, Any]]) -> Table:
    """Languages before a chain and after each of its steps that was measured, worst first."""
    names = list(evaluations)
    rows = {
        name: {r["language"]: r for r in found["languages"]} for name, found in evaluations.items()
    }
    table = Table(title="NLL in nats per token", title_justify="left")
    table.add_column("lang")
    for head in ("before", *(f"after {name}" for name in names), "lost", "95 % CI"):
        table.add_column(head, justify="right")
    last = evaluations[names[-1]]
    for row in last["languages"]:
        language = row["language"]
        after = [number(rows[name][language]["nll"]) for name in names]
        lost = [number(row["dnll"], sign=True), interval(row.get("dnll_interval"))]
        style = "bold" if language == "en" else None
        table.add_row(language, number(row["base_nll"]), *after, *lost, style=style)
    table.add_section()
    after = [number(evaluations[name]["nll"]) for name in names]
    table.add_row("all", number(last["base_nll"]), *after, number(last["dnll"], sign=True), "")
    return table


def verdict(found: Evaluation) -> str:
    """The worst language with English beside it, the gap, and wrong scripts."""
    worst, english = found.worst, found.english
    if english is None:
        beside = "English: not in the texts"
    elif english is worst:
        beside = "that is English itself"
    else:
        beside = f"English {_loss(english)}"
    parts = [f"worst {worst.language} {_loss(worst)}", beside]
    if found.compared:
        parts.append(f"worst minus median {found.gap:+.3f} nats")
    else:
        parts.append(f"all languages {found.nll:.3f} nats per token")
    if worst.over_english is not None:
        low_high = interval(worst.over_english_interval, 2)
        parts.append(
            f"{worst.language} minus English, same sentences: {worst.over_english:+.2f} nats per "
            f"sentence {low_high}"
        )
    if found.worst_script is not None:
        parts.append(_worst_script(found.worst_script))
    return "; ".join(parts)


def _worst_script(row: LanguageResult) -> str:
    """Where most letters are in a wrong script; the change against the base with its 95 % CI."""
    if row.wrong_script == 0:
        return "no letter in a wrong script"
    said = f"most letters in a wrong script: {row.language} {100 * row.wrong_script:.1f} %"
    if row.wrong_script_delta is None:
        return said
    pair = row.wrong_script_interval
    spread = "" if pair is None else f" [{100 * pair[0]:+.1f}, {100 * pair[1]:+.1f}]"
    return f"{said} ({100 * row.wrong_script_delta:+.1f}{spread} against the base)"


def _loss(row: LanguageResult) -> str:
    if row.dnll is None:
        return f"{row.nll:.3f} nats {interval(row.nll_interval, sign=False)}"
    return f"{row.dnll:+.3f} nats {interval(row.dnll_interval)}, PPL x{row.ppl_ratio:.3f}"


def _title(found: Evaluation) -> str:
    how = f"windows of {found.window} tokens" if found.mode == "windows" else "sentence by sentence"
    against = f" against {found.base}" if found.compared else ""
    return f"{found.model}{against}, {how}, nats per token"


def _alone(row: LanguageResult) -> list[str]:
    return [
        str(row.samples),
        str(row.tokens),
        number(row.nll),
        interval(row.nll_interval, sign=False),
        number(row.ppl, 2),
        number(row.bits_per_byte),
    ]


def _compared(row: LanguageResult) -> list[str]:
    return [
        str(row.samples),
        str(row.tokens),
        number(row.base_nll),
        number(row.nll),
        number(row.dnll, sign=True),
        interval(row.dnll_interval),
        number(row.ppl_ratio),
        f"{row.base_bits_per_byte:.3f} -> {row.bits_per_byte:.3f}",
        number(row.kl),
        number(row.kl_p99, 2),
        f"{100 * row.agreement:.1f} %",
    ]


def _scripts(row: LanguageResult, compared: bool) -> str:
    """Share of letters in a wrong script, the base's first where there is one."""
    shares = [row.base_wrong_script, row.wrong_script] if compared else [row.wrong_script]
    if row.continuations is None:
        return "-"
    return " -> ".join("no letter" if s is None else f"{100 * s:.1f} %" for s in shares)
