"""The end of the page: speed, training, samples, earlier runs, how to do it again, limits."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from typing import Any

from .charts import Line, lines
from .facts import Facts
from .records import Sample, SpeedRow
from .tongues import tongue
from .words import (
    bytes_text,
    clean,
    count,
    duration,
    number,
    parted,
    pathless,
    plain_name,
    significant,
)

GAIN = 1.05  # a smaller factor is no gain
_DISTURBED = 1.15  # the same where something ran beside it, see measure.clock.LIMIT
_OPEN = 5  # languages whose samples are shown without opening more
_EACH = 2  # samples of a language
_MOST_LANGUAGES = 150
_PRINTED = ("recipe.yaml", "config.json", "tokenizer.json", "results.json", "layers.csv")


def speed(facts: Facts) -> dict[str, Any] | None:
    """Measured rates and memory beside the dense model, what could be gained, and where nothing
    was.
    """
    told = facts.speed
    if told is None:
        return None
    ours, dense = told.rows[0], told.rows[1] if len(told.rows) > 1 else None
    rows = [] if dense is None else _gains(ours, dense, told.read)
    machine = told.machine
    cores = f"{machine['cores']} cores" if machine.get("cores") else ""
    where = [machine.get("gpu") or machine.get("cpu"), cores]
    plural = "s" * (ours.threads > 1)
    return {
        "rows": rows,
        "models": [_model(row) for row in told.rows],
        "how": f"{ours.prompt} prompt tokens, {ours.new} decoded, {ours.threads} thread{plural}",
        "where": clean(", ".join(str(each) for each in where if each), 200),
        "contended": [plain_name(row.name) for row in told.rows if row.contended],
        "read": None if told.read is None else number(told.read, 1),
        "same": dense is not None and ours.same_work(dense),
        "in_cache": told.in_cache,
        "why": _why(ours),
    }


def _model(row: SpeedRow) -> tuple[str, str, str, str, str]:
    rates = significant(row.prefill_rate), significant(row.decode_rate)
    return plain_name(row.name), clean(row.weights, 80), bytes_text(row.nbytes), *rates


def _gains(ours: SpeedRow, dense: SpeedRow, read: float | None) -> list[dict[str, Any]]:
    """Rows of (what, ours, dense, gain, ceiling, whether there is no gain)."""
    most = dense.nbytes / ours.nbytes
    least = _DISTURBED if ours.contended or dense.contended else GAIN
    if ours.same_work(dense):
        least = math.inf
    bound = f"×{number(most, 2)} if reading weights were all"
    if read is not None:
        bound += f"; memory gives {significant(1e9 * read / ours.nbytes)} tokens/s at most"
    found = [_gain("Memory held", (ours.nbytes, dense.nbytes), bytes_text, most, "–", GAIN)]
    rates = [
        ("Decoding, tokens/s", "decode_rate", bound),
        ("Reading the prompt, tokens/s", "prefill_rate", "arithmetic binds: bytes promise nothing"),
        ("Decoding as a CUDA graph, tokens/s", "graph_rate", bound),
    ]
    for what, key, ceiling in rates:
        pair = getattr(ours, key), getattr(dense, key)
        if all(pair):
            found.append(_gain(what, pair, significant, pair[0] / pair[1], ceiling, least))
    return found


def _gain(
    what: str,
    pair: tuple[float, float],
    text: Callable[[float], str],
    gain: float,
    ceiling: str,
    least: float,
) -> dict[str, Any]:
    return {
        "what": what,
        "ours": text(pair[0]),
        "dense": text(pair[1]),
        "gain": f"×{number(gain, 2)}",
        "ceiling": ceiling,
        "none": gain < least,
    }


def _why(ours: SpeedRow) -> str:
    """Why zeros alone gain nothing; nothing is claimed of packed weights."""
    if re.search(r"int\d", ours.weights):
        return "The weights run packed; what that gains on this machine is measured above."
    return (
        "The weights are stored and multiplied as ordinary dense numbers: zeros among them take as "
        "much memory and time as any other number."
    )


def training(facts: Facts) -> dict[str, Any] | None:
    """The curve, and each language before and after on held-out text."""
    if facts.training is None:
        return None
    told = facts.training
    course, found = told.course, []
    if len(facts.losses) > 1:
        found.append(Line("training", [(float(s), loss) for s, loss in facts.losses], "other"))
    if course.held_out:
        points = [(float(step), loss) for step, loss in course.held_out]
        found.append(Line("held-out", points, "worst", dots=True))
    title = "Loss over the steps, nats per label"
    rows = []
    for lang in told.after:
        before, after = told.before.get(lang, {}), told.after[lang]
        cells = [number(each.get(key)) for key in ("nll", "kl") for each in (before, after)]
        change = None
        if "nll" in before and "nll" in after:
            change = after["nll"] - before["nll"]
        everything = lang == "all"
        rows.append(((None if everything else tongue(lang)), *cells, number(change, sign=True)))
    kl = any("kl" in each for each in told.after.values())
    return {
        "plot": lines("training", found, title, "optimiser step") if found else "",
        "rows": rows,
        "kl": kl,
        "before": facts.trained_before,
        "steps": count(course.steps),
        "best": None if course.best_step is None else count(course.best_step),
        "best_loss": number(course.best_loss, 4),
        "tokens": count(course.tokens),
        "rate": significant(course.tokens_per_second),
        "seconds": duration(course.seconds),
        "parameters": count(course.parameters),
        "what": clean(str(told.spec.get("train", "")), 60),
    }


def samples(facts: Facts) -> dict[str, Any] | None:
    """The same beginnings continued by both models, by language: the worst first, then English."""
    if facts.evaluations is None or not facts.evaluations.last.samples:
        return None
    last = facts.evaluations.last
    groups: dict[str, list[Sample]] = {}
    for each in last.samples:
        groups.setdefault(each.language, []).append(each)
    order = {row.language: place for place, row in enumerate(last.languages)}
    worst = last.languages[0].language

    def rank(language: str) -> tuple[int, int]:
        english = language.partition("-")[0] in ("en", "eng")
        return 0 if language == worst else 1 if english else 2, order.get(language, len(order))

    told = [
        {
            "tongue": tongue(language),
            "samples": [_sample(each) for each in groups[language][:_EACH]],
        }
        for language in sorted(groups, key=rank)[:_MOST_LANGUAGES]
    ]
    return {"first": told[:_OPEN], "more": told[_OPEN:]}


def _sample(each: Sample) -> dict[str, Any]:
    return {
        "prompt": clean(each.prompt, 1500),
        "base": None if each.base is None else parted(each.base, each.model),
        "model": parted(each.model, each.base),
    }


def changes(facts: Facts) -> list[dict[str, Any]]:
    """What got worse or better since the runs before of the same commands."""
    runs = (("Evaluation", facts.evaluations), ("Speed", facts.speed))
    found = []
    for name, run in runs:
        if run is None or run.before is None:
            continue
        rows = [
            (clean(c.what, 120), significant(c.was, 4), significant(c.now, 4), c.worse)
            for c in run.before.changes
        ]
        about = {"time": clean(run.before.time, 40), "version": clean(run.before.version, 40)}
        found.append({"name": name, **about, "rows": rows})
    return found


def again(facts: Facts) -> dict[str, Any]:
    """The command that makes the folder again, the recipe, and what pins it down."""
    prints = [
        (name, hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest())
        for name in _PRINTED
        if (path := facts.folder / name).is_file()
    ]
    steps = (
        [(clean(s.name, 60), clean(s.fingerprint, 128)) for s in facts.steps.steps]
        if facts.steps
        else []
    )
    return {
        "command": "distaya compress --recipe recipe.yaml --out NEW" if facts.recipe else None,
        "recipe": _recipe_text(facts.recipe_text),
        "prints": prints,
        "steps": steps,
    }


def _recipe_text(text: str) -> str:
    """The file without the ways to models and texts on the machine it ran on."""

    def short(match: re.Match) -> str:
        return match[1] + plain_name(match[2])

    lines_ = [re.sub(r"^(\s*[\w-]+: )(['\"]?[~/].*)$", short, line) for line in text.splitlines()]
    return clean("\n".join(lines_), 20_000)


def limits(facts: Facts) -> list[str]:
    """What the numbers above do not say."""
    from ..evaluate.result import LIMITS

    found = [f"Left out: {pathless(clean(each, 600))}." for each in facts.damaged]
    if facts.evaluations is not None:
        found += [pathless(clean(note, 600)) for note in facts.evaluations.last.notes]
        rows = facts.evaluations.last.languages
        if min(row.samples for row in rows) < 30:
            few = min(rows, key=lambda row: row.samples)
            found.append(
                f"As few as {few.samples} samples per language give wide intervals; languages "
                "whose intervals overlap are not told apart."
            )
    if not any(LIMITS in note for note in found):
        found.append(LIMITS)
    if facts.speed is not None:
        found.append(
            "Speed was measured on the machine named above and says little of another one."
        )
    return found
