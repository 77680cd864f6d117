"""The top of the page: which model this is, what it cost each language, and what was allowed."""

from __future__ import annotations

from typing import Any

from .charts import Dot, dots
from .facts import Facts
from .records import Evaluated, Language, Results
from .tongues import tongue
from .words import (
    bytes_text,
    clean,
    count,
    duration,
    interval,
    number,
    pathless,
    percent,
    plain_name,
)


def bits_per_weight(results: Results) -> tuple[float, int] | None:
    """Bits on disk per weight of the Linears, the embedding and the head, and how many weights."""
    ends = results.size.ends.values()
    weights = results.totals.weights + sum(end.weights for end in ends)
    if not weights:
        return None
    return 8 * (results.totals.bytes + sum(end.bytes for end in ends)) / weights, weights


def done(facts: Facts) -> str:
    """What was done to the model, in a line such as "2:4 zeros, 4-bit weights in groups of 128"."""
    recipe, parts = facts.recipe, []
    dropped = (facts.results.dropped_layers if facts.results else None) or []
    if dropped:
        parts.append(f"{len(dropped)} layer{'s' * (len(dropped) > 1)} left out")
    if facts.results is not None and facts.results.totals.zeros:
        exact = recipe.get("nm")
        parts.append(
            f"{exact} zeros" if exact else f"{percent(facts.results.totals.sparsity)} zeros"
        )
    if bits := recipe.get("bits"):
        group = recipe.get("group")
        parts.append(f"{bits}-bit weights" + (f" in groups of {group}" if group else ""))
    if embed := recipe.get("embed_bits"):
        parts.append(f"{embed}-bit embedding")
    if facts.training is not None:
        parts.append("trained")
    if facts.student is not None:
        parts.append("cut narrower or shorter")
    return clean(", ".join(parts), 300)


def header(facts: Facts) -> dict[str, Any]:
    """The model's name, the figures beside it, and the small print of the run."""
    return {
        "title": facts.source or clean(str(facts.config.get("model_type", "a model")), 100),
        "done": done(facts),
        "figures": _figures(facts),
        "facts": _small_print(facts),
    }


def _figures(facts: Facts) -> list[tuple[str, str, str]]:
    """(label, figure, what it means)."""
    found = []
    if facts.results is not None:
        size, bits = facts.results.size, bits_per_weight(facts.results)
        found.append(("Weights on disk", bytes_text(size.file_bytes), f"format {size.format}"))
        if bits:
            found.append(("Bits per weight", number(bits[0], 2), "embeddings counted"))
    if facts.evaluations is not None and facts.evaluations.last.base is not None:
        rows = facts.evaluations.last.languages
        worst = rows[0]
        name = tongue(worst.language).name
        found.append((f"Worst: {name}", ratio(worst), "perplexity against the original"))
        english = _english(rows)
        if english is not None and english is not worst:
            found.append(("English", ratio(english), "perplexity against the original"))
    if facts.speed is not None and facts.speed.ratios and "decode" in facts.speed.ratios:
        gain = facts.speed.ratios["decode"]
        found.append(("Decoding", f"×{number(gain, 2)}", "tokens per second against dense"))
    return found


def ratio(row: Language) -> str:
    """×1.23, a dash without a base."""
    return "–" if row.ppl_ratio is None else f"×{number(row.ppl_ratio, 2)}"


def _small_print(facts: Facts) -> list[tuple[str, str]]:
    found, results = [], facts.results
    if facts.config.get("model_type"):
        found.append(("Architecture", clean(str(facts.config["model_type"]), 60)))
    if results is not None:
        quality = f", quality {results.quality}" if results.quality else ""
        found.append(("Method", clean(f"{results.method}{quality}", 120)))
        took = f"{duration(results.totals.seconds)}, {count(results.totals.modules)} matrices"
        found.append(("Compressed in", took))
    if facts.steps is not None:
        told = ", ".join(f"{clean(s.name, 40)} {duration(s.seconds)}" for s in facts.steps.steps)
        found.append(("Steps", told))
    if facts.training is not None:
        course = facts.training.course
        found.append(("Trained in", f"{duration(course.seconds)}, {count(course.steps)} steps"))
    if machine := _machine(facts):
        found.append(("Hardware", machine))
    versions = results.versions if results else facts.training.versions if facts.training else {}
    if versions:
        told = ", ".join(f"{name.replace('_', '-')} {text}" for name, text in versions.items())
        found.append(("Versions", clean(told, 300)))
    return found


def _machine(facts: Facts) -> str:
    machine = (facts.results.machine if facts.results else None) or {}
    if not machine and facts.speed is not None:
        machine = facts.speed.machine
    parts = [str(machine[key]) for key in ("cpu", "gpu") if machine.get(key)]
    if machine.get("cores"):
        parts.append(f"{machine['cores']} cores")
    return clean(", ".join(parts), 200)


def verdict(facts: Facts) -> dict[str, Any] | None:
    """The sentence that counts, what belongs to it, and the gate; None without an evaluation."""
    told = facts.evaluations
    if told is None:
        return None
    last = told.last
    rows = last.languages
    if last.base is None:
        worst, text = rows[0], "Nothing was compared: these are the model's own numbers."
        points = [
            f"highest loss in {tongue(worst.language).name}: {number(worst.nll)} nats per token"
        ]
        return {"sentence": text, "points": points, "gate": None}
    return {"sentence": _sentence(rows), "points": _points(last), "gate": _gate(facts)}


def _sentence(rows: list[Language]) -> str:
    worst, english = rows[0], _english(rows)
    name = tongue(worst.language).name
    if worst is english:
        return f"English lost most: its perplexity is {_times(worst)} the original's."
    beside = f"; English has {_times(english)}" if english is not None else ""
    return f"{name} lost most: its perplexity is {_times(worst)} the original's{beside}."


def _times(row: Language) -> str:
    return "–" if row.ppl_ratio is None else f"{number(row.ppl_ratio, 2)} times"


def _points(last: Evaluated) -> list[str]:
    rows, points = last.languages, []
    worst, english = rows[0], _english(rows)
    name = tongue(worst.language).name
    points.append(
        f"{name}: {number(worst.dnll, sign=True)} nats per token, 95 % interval "
        f"{interval(worst.dnll_interval)}"
    )
    if english is not None and english is not worst:
        points.append(
            f"English: {number(english.dnll, sign=True)} nats per token, 95 % interval "
            f"{interval(english.dnll_interval)}"
        )
    known = [row for row in rows if row.dnll_interval is not None]
    if known:
        above = sum(row.dnll_interval[0] > 0 for row in known)
        points.append(f"{above} of {len(known)} languages lost more than chance explains")
    if last.gap is not None:
        points.append(f"worst minus median: {number(last.gap, sign=True)} nats per token")
    if worst.over_english is not None and worst is not english:
        points.append(
            f"{name} minus English on the same sentences: {number(worst.over_english, 2, True)} "
            f"nats per sentence, {interval(worst.over_english_interval, 2)}"
        )
    return points


def _gate(facts: Facts) -> dict[str, str]:
    """state: failed, passed or none."""
    told, limits = facts.evaluations, _limits(facts)
    asked = "; ".join(f"{clean(name, 60)} at most {limit:g}" for name, limit in limits.items())
    if told.gate is not None:
        return {"state": "failed", "title": "Gate failed", "text": pathless(clean(told.gate, 600))}
    if asked:
        return {"state": "passed", "title": "Gate passed", "text": asked}
    text = "No limit was set; distaya eval --gate max_worst_ppl_ratio=1.15 sets one."
    return {"state": "none", "title": "No gate", "text": text}


def _limits(facts: Facts) -> dict[str, float]:
    """Those of `distaya eval`, or of the recipe where a chain evaluated its own steps."""
    spec = facts.recipe.get("evaluate")
    if facts.evaluations.asked or "evaluate" in facts.evaluations.steps:
        return facts.evaluations.asked
    told = spec.get("gate") if isinstance(spec, dict) else None
    limits = told.items() if isinstance(told, dict) else ()
    return {str(name): limit for name, limit in limits if isinstance(limit, (int, float))}


def _english(rows: list[Language]) -> Language | None:
    return next((row for row in rows if row.language.partition("-")[0] in ("en", "eng")), None)


def languages(facts: Facts) -> dict[str, Any] | None:
    """Dot plot, table, groups of languages, and the steps of a chain."""
    if facts.evaluations is None:
        return None
    last = facts.evaluations.last
    compared, english = last.base is not None, _english(last.languages)
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
