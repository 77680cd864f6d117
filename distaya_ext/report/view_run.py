"""The middle of the page: layers, modules that were not solved as asked, texts, sizes."""

from __future__ import annotations

import re
from typing import Any

from .charts import Bar, Line, bar, heat, lines, stack
from .facts import Facts
from .records import Module, Results
from .tongues import tongue
from .view_verdict import bits_per_weight
from .words import bytes_text, clean, count, number, pathless, percent, significant

_WORST = 10  # modules in the table of the worst
_MOST_ENTRIES = 500  # fallbacks in a table
_MOST_SERIES = 100  # lines in a plot
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def layers(facts: Facts) -> dict[str, Any] | None:
    """Loss of each module, how the languages' errors grow, and what each layer does."""
    known = [m for m in facts.modules if m.relative_loss is not None and m.layer is not None]
    found: dict[str, Any] = {}
    if known:
        found["heat"] = heat(
            _table(known), "Relative loss of each matrix", "output error over the dense output's"
        )
        top = max(known, key=lambda m: m.relative_loss)
        found["most"] = (
            f"{significant(top.relative_loss)} in {clean(top.kind, 24)} of layer {top.layer}"
        )
        worst = sorted(known, key=lambda m: -m.relative_loss)[:_WORST]
        found["worst"] = [
            (clean(m.module, 120), significant(m.relative_loss), percent(m.sparsity), m.bits or "–")
            for m in worst
        ]
    elif facts.modules:
        found["unknown"] = "No losses: this method takes no statistics of the activations."
    if facts.results is not None and (growth := _growth(facts.results)):
        found["growth"] = growth
    if influence := _influence(facts):
        found["influence"] = influence
    return found or None


def _table(modules: list[Module]) -> dict[str, dict[int, float]]:
    kinds = dict.fromkeys(m.kind for m in modules)
    order = [k for k in _ORDER if k in kinds] + [k for k in kinds if k not in _ORDER]
    table: dict[str, dict[int, float]] = {clean(kind, 24): {} for kind in order}
    for module in modules:
        table[clean(module.kind, 24)][module.layer] = max(0.0, module.relative_loss)
    return table


def _growth(results: Results) -> Any:
    """Relative squared error of the hidden states after each layer, a line per language."""
    each = {
        lang: about.error for lang, about in results.calibration.languages.items() if about.error
    }
    if not each or max(map(len, each.values())) < 2:
        return None
    ranked = sorted(each, key=lambda lang: -each[lang][-1])[:_MOST_SERIES]
    english = next((lang for lang in ranked if lang.partition("-")[0] in ("en", "eng")), None)
    found = []
    for lang in reversed(ranked):
        role = "english" if lang == english else "worst" if lang == ranked[0] else "other"
        points = [(float(i), value) for i, value in enumerate(each[lang])]
        found.append(Line(clean(tongue(lang).name, 24), points, role))
    found.sort(key=lambda line: ("other", "english", "worst").index(line.role))
    title = "Error of the hidden states after each layer, by language"
    return lines("growth", found, title, "layer")


def _influence(facts: Facts) -> dict[str, Any] | None:
    """The score that layers were chosen by, and which went."""
    told = facts.layers
    if told is None:
        return None
    score = told.score if told.score in told.layers.scores else next(iter(told.layers.scores), None)
    means = told.layers.scores.get(score, {}).get("mean", []) if score else []
    points = []
    for name, value in zip(told.layers.candidates, means, strict=False):
        if (match := re.fullmatch(r"layer (\d{1,6})", name)) and isinstance(value, (int, float)):
            points.append((float(match[1]), float(value)))
    plot = ""
    if len(points) > 1:
        line = [Line(clean(score, 12), points, "english", dots=True)]
        plot = lines("influence", line, f"Score {clean(score, 40)} of each layer", "layer")
    dropped = ", ".join(map(str, told.dropped)) or "none"
    return {"plot": plot, "score": clean(score or told.score, 40), "dropped": dropped}


def degraded(facts: Facts) -> dict[str, Any] | None:
    """Every fallback there was: counted, explained, named."""
    if facts.results is None:
        return None
    told, totals = facts.results.fallbacks, facts.results.totals
    notices = [pathless(clean(note, 400)) for note in facts.results.notices]
    if told is None:
        kinds = [("pivot_floor", totals.floored), ("rtn_columns", totals.dead)]
        return {
            "counted": False,
            "degraded": 0,
            "of": totals.modules,
            "kinds": [_kind(kind, number) for kind, number in kinds if number],
            "modules": [],
            "more": 0,
            "notices": notices,
        }
    modules = [
        {**_kind(m.kind, m.count), "module": clean(m.module, 120), "what": clean(m.what or "", 200)}
        | {"degraded": m.degraded}
        for m in sorted(told.modules, key=lambda m: not m.degraded)[:_MOST_ENTRIES]
    ]
    return {
        "counted": True,
        "degraded": told.degraded,
        "of": told.of,
        "kinds": [_kind(kind, number) for kind, number in told.kinds.items() if number],
        "modules": modules,
        "more": len(told.modules) - len(modules),
        "notices": notices,
    }


def _kind(kind: str, number: int) -> dict[str, str]:
    from ..compress.fallbacks import KINDS

    name = clean(kind.replace("_", " "), 80)
    return {"name": name, "meaning": KINDS.get(kind, ""), "count": count(number)}


def calibration(facts: Facts) -> dict[str, Any] | None:
    """Which texts decided: tokens per language, tokens per character, weight."""
    if facts.results is None or not facts.results.calibration.tokens:
        return None
    told = facts.results.calibration
    weights = told.weights if isinstance(told.weights, dict) else {}
    shares = {
        lang: sum(about.share) / len(about.share)
        for lang, about in told.languages.items()
        if about.share
    }
    most = max(told.tokens_per_language.values(), default=0)
    rows = []
    for lang, tokens in sorted(told.tokens_per_language.items(), key=lambda f: (-f[1], f[0])):
        about = told.languages.get(lang)
        rows.append(
            {
                "tongue": tongue(lang),
                "tokens": count(tokens),
                "bar": bar(tokens, most),
                "fertility": number(about.fertility, 2) if about else "–",
                "bytes": number(about.bytes_per_token, 2) if about else "–",
                "share": percent(shares.get(lang)),
                "weight": f"{weights[lang]:g}" if lang in weights else "",
            }
        )
    how = "given by hand" if weights else clean(str(told.weights), 40)
    return {
        "tokens": count(told.tokens),
        "window": count(told.window),
        "weights": how,
        "by_hand": bool(weights),
        "rows": rows,
    }


def size(facts: Facts) -> dict[str, Any] | None:
    """Bytes on disk by part, the embedding apart."""
    if facts.results is None:
        return None
    totals, files = facts.results.totals, facts.results.size
    parts = [
        ("compressed matrices", totals.weights, totals.bytes, totals.bits_per_weight, "linears")
    ]
    for name, end in files.ends.items():
        what = "embedding" if "embed" in name else "head"
        parts.append((what, end.weights, end.bytes, end.bits_per_weight, what))
    rest = files.file_bytes - sum(part[2] for part in parts)
    if rest > 0:
        parts.append(("norms, matrices left as they were, headers", None, rest, None, "rest"))
    total = max(1, files.file_bytes)
    rows = [
        {
            "name": name,
            "role": role,
            "weights": "–" if weights is None else count(weights),
            "bytes": bytes_text(size),
            "bits": number(bits, 3),
            "share": percent(size / total),
        }
        for name, weights, size, bits, role in parts
    ]
    bits = bits_per_weight(facts.results)
    return {
        "plot": stack([Bar(p[0], p[2], p[4]) for p in parts], "Bytes by part", "Weights on disk"),
        "rows": rows,
        "total": bytes_text(files.file_bytes),
        "bits": number(bits[0], 3) if bits else "–",
        "linear_bits": number(totals.bits_per_weight, 3),
        "weights": count(bits[1]) if bits else "–",
        "sparsity": percent(totals.sparsity),
        "format": clean(files.format, 40),
    }
