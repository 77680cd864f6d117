"""The languages of a page: plot, table, groups, the steps of a chain."""

from __future__ import annotations

from typing import Any

from .charts import Dot, dots
from .facts import Facts
from .records import Evaluated, Language
from .tongues import tongue
from .words import clean, count, interval, number, percent, plain_name


def ratio(row: Language) -> str:
    """×1.23, a dash without a base."""
    return "–" if row.ppl_ratio is None else f"×{number(row.ppl_ratio, 2)}"


def english_of(rows: list[Language]) -> Language | None:
    return next((row for row in rows if row.language.partition("-")[0] in ("en", "eng")), None)


def languages(facts: Facts) -> dict[str, Any] | None:
    """Dot plot, table, groups of languages, and the steps of a chain."""
    if facts.evaluations is None:
        return None
    last = facts.evaluations.last
    compared, english = last.base is not None, english_of(last.languages)
    marks = []
    for place, row in enumerate(last.languages):
        role = "english" if row is english else "worst" if place == 0 else ""
        value = row.dnll if compared else row.nll
        low_high = row.dnll_interval if compared else row.nll_interval
        if value is not None:
            text = ratio(row) if compared else number(row.nll, 2)
            marks.append(Dot(clean(tongue(row.language).name, 24), value, low_high, text, role))
    unit = "nats per token lost" if compared else "nats per token"
    title = "What each language lost, worst first" if compared else "Loss of each language"
    return {
        "compared": compared,
        "base": plain_name(last.base) if compared else None,
        "how": _how(last),
        "plot": dots(marks, title, unit, zero=compared) if marks else "",
        "rows": [_row(row, row is english) for row in last.languages],
        "wrong_script": any(row.wrong_script is not None for row in last.languages),
        "groups": _groups(last.languages) if compared else [],
        "steps": _steps(facts) if len(facts.evaluations.steps) > 1 else [],
    }


def _how(last: Evaluated) -> str:
    rows = last.languages
    tokens = sum(row.tokens for row in rows)
    what = f"windows of {last.window} tokens" if last.mode == "windows" else "parallel sentences"
    samples = sorted({row.samples for row in rows})
    each = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    return f"{each} {what} per language, {count(tokens)} tokens in all"


def _row(row: Language, english: bool) -> dict[str, Any]:
    bits = number(row.bits_per_byte)
    if row.base_bits_per_byte is not None:
        bits = f"{number(row.base_bits_per_byte)} → {bits}"
    wrong = percent(row.wrong_script)
    if row.base_wrong_script is not None and row.wrong_script is not None:
        wrong = f"{percent(row.base_wrong_script)} → {wrong}"
    return {
        "tongue": tongue(row.language),
        "english": english,
        "nll": number(row.nll),
        "nll_interval": interval(row.nll_interval, sign=False),
        "dnll": number(row.dnll, sign=True),
        "interval": interval(row.dnll_interval),
        "ratio": ratio(row),
        "bits": bits,
        "kl": number(row.kl),
        "kl_p99": number(row.kl_p99, 2),
        "agreement": percent(row.agreement),
        "wrong": wrong,
    }


def _groups(rows: list[Language]) -> list[dict[str, Any]]:
    """Means over the languages of a script, and of a class of resources; the worst first."""
    found = []
    for title, of in (("script", "script"), ("resources", "resources")):
        groups: dict[str, list[Language]] = {}
        for row in rows:
            name = getattr(tongue(row.language), of)
            if name is not None and row.dnll is not None:
                groups.setdefault(name, []).append(row)
        if len(groups) < 2:
            continue
        lines = []
        for name, inside in groups.items():
            mean = sum(row.dnll for row in inside) / len(inside)
            worst = max(inside, key=lambda row: row.dnll)
            lines.append((mean, name, len(inside), tongue(worst.language).name, ratio(worst)))
        lines.sort(key=lambda found: -found[0])
        told = [(name, size, number(mean, sign=True), *rest) for mean, name, size, *rest in lines]
        found.append({"by": title, "rows": told})
    return found


def _steps(facts: Facts) -> list[tuple[str, str, str, str]]:
    """(step, mean lost, worst language, its ratio) of each step of a chain."""
    found = []
    for name, each in facts.evaluations.steps.items():
        worst = each.languages[0]
        lost = number(each.dnll, sign=True)
        found.append((clean(name, 60), lost, tongue(worst.language).name, ratio(worst)))
    return found
