"""The top of the page: which model this is, what it cost each language, and what was allowed."""

from __future__ import annotations

from typing import Any

from .facts import Facts
from .records import Evaluated, Language, Results
from .tongues import tongue
from .view_languages import english_of, ratio
from .words import (
    bytes_text,
    clean,
    count,
    duration,
    interval,
    number,
    pathless,
    percent,
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
    if facts.training is not None and not facts.trained_before:
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
        english = english_of(rows)
        if english is not None and english is not worst:
            found.append(("English", ratio(english), "perplexity against the original"))
    if facts.speed is not None and facts.speed.ratios and "decode" in facts.speed.ratios:
        gain = number(facts.speed.ratios["decode"], 2)
        disturbed = any(row.contended for row in facts.speed.rows)
        about = "tokens per second against dense" + (", disturbed" if disturbed else "")
        none = len(facts.speed.rows) > 1 and facts.speed.rows[0].same_work(facts.speed.rows[1])
        found.append(("Decoding", "no gain" if none else f"×{gain}", about))
    return found


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
    if facts.training is not None and not facts.trained_before:
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
    worst, english = rows[0], english_of(rows)
    name = tongue(worst.language).name
    if worst is english:
        return f"English lost most: its perplexity is {_times(worst)} the original's."
    beside = f"; English has {_times(english)}" if english is not None else ""
    return f"{name} lost most: its perplexity is {_times(worst)} the original's{beside}."


def _times(row: Language) -> str:
    return "–" if row.ppl_ratio is None else f"{number(row.ppl_ratio, 2)} times"


def _points(last: Evaluated) -> list[str]:
    rows, points = last.languages, []
    worst, english = rows[0], english_of(rows)
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
