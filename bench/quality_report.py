"""The quality bench in Markdown: one table of all rows, one of what takes equal bytes."""

from __future__ import annotations

from collections.abc import Sequence

from bench.quality_rows import Row
from bench.quality_stats import Figures, Interval
from bench.quality_store import Store

_HEAD = (
    "weights", "method", "delta NLL", "x published", "worst language", "KL", "KL p99",
    "same first choice", "bits/weight", "s", "x plain s",
)  # fmt: skip
_EQUAL = ("bits/weight", "weights", "method", "delta NLL", "worst language", "KL")
_NEAR = 0.06  # bits per weight that "the same size" may differ by


def table(store: Store, rows: Sequence[Row], found: Sequence[Figures]) -> str:
    """All rows, those that could not be made with the reason, and what the columns mean."""
    by = {f.row.key: f for f in found}
    lines = _header(_HEAD, 2)
    for row in rows:
        if row.key in by:
            lines.append(_line(by[row.key]))
        elif row.key in store.missing:
            cells = [row.pattern.name, row.label, f"missing: {store.missing[row.key]}"]
            lines.append(_join(cells + [""] * (len(_HEAD) - len(cells))))
    return "\n".join([*lines, "", notes(store, found)])


def equal_size(found: Sequence[Figures], bits: float) -> str:
    """Rows of about so many bits per weight, best first; empty when there are fewer than two."""
    near = sorted((f for f in found if abs(f.bits - bits) <= _NEAR), key=lambda f: f.delta)
    if len(near) < 2:
        return ""
    lines = _header(_EQUAL, 3)
    for f in near:
        cells = [f"{f.bits:.3f}", f.row.pattern.name, f.row.label, _delta(f), _worst(f)]
        lines.append(_join([*cells, f"{f.kl:.4f}"]))
    return "\n".join([f"At {bits:.3f} bits per weight:", "", *lines])


def notes(store: Store, found: Sequence[Figures]) -> str:
    """What was run, for the reader of the table."""
    s = store.settings
    per = f"{s['test_windows']} of each" if s["test_windows"] else "all of each"
    seeds = sorted({seed for _, seed in store.records if seed is not None})
    parts = [
        f"{s['model']}; {s['windows']} windows of {s['window']} tokens calibrate (seeds "
        f"{', '.join(map(str, seeds)) or 'none'}), {per} of {len(store.dense['languages'])} "
        f"languages judge (dense: NLL {store.dense['nll']:.4f}). Delta NLL in nats per token, mean "
        "over languages and seeds, 95 % paired bootstrap over test windows.",
        "x published: over textbook SparseGPT (GPTQ where nothing is pruned) at the same pattern, "
        "paired; rows of the MLP alone over SparseGPT of the MLP alone. DaSS groups N:M along the "
        "outputs in gate and up, which no sparse tensor core executes.",
        "s: ours with reading, proving and writing, published ones in memory.",
    ]
    seeded = [f for f in found if f.spread is not None]
    if seeded:
        most = max(seeded, key=lambda f: f.spread)
        parts.append(
            "Intervals are of the test text; over calibration seeds delta NLL has a standard "
            f"deviation of at most {most.spread:.4f} ({most.row.label}, {most.row.pattern.name})."
        )
    if not any(f.timed for f in found):
        parts.append("No rounds were timed (--timing), so no ratio of seconds is claimed.")
    if any(f.timed for f in found):
        t = store.timing
        parts.append(
            f"x plain s: medians of {t['rounds']} rounds in turns, {t['threads']} thread(s)."
        )
    return " ".join(parts)


def text(store: Store, rows: Sequence[Row], found: Sequence[Figures]) -> str:
    """Everything in Markdown."""
    uniform = [f for f in found if f.row.pattern.bits]
    sizes = sorted({round(_nominal(f, store), 3) for f in uniform})
    parts = [table(store, rows, found), *(equal_size(found, bits) for bits in sizes)]
    return "\n\n".join(part for part in parts if part)


def _nominal(f: Figures, store: Store) -> float:
    return f.row.pattern.nominal(store.settings["group"], store.settings["symmetric"])


def _line(f: Figures) -> str:
    ratio = "" if f.ratio is None else f"{f.ratio:.3f} {_interval(f.ratio_interval, 2)}"
    cells = [f.row.pattern.name, f.row.label, _delta(f), ratio, _worst(f)]
    cells += [f"{f.kl:.4f}", f"{f.kl_p99:.3f}", f"{100 * f.agreement:.1f} %", f"{f.bits:.3f}"]
    slower = "" if f.slower is None else f"{f.slower:.2f}"
    return _join([*cells, f"{f.seconds:.1f}", slower])


def _delta(f: Figures) -> str:
    return f"{f.delta:+.4f} {_interval(f.delta_interval, 3)}"


def _worst(f: Figures) -> str:
    return f"{f.worst_language} {f.worst:+.3f} {_interval(f.worst_interval, 3)}"


def _interval(bounds: Interval | None, digits: int) -> str:
    if bounds is None:  # of a ratio whose denominator is not clearly above zero
        return "[not bounded]"
    return f"[{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"


def _header(names: Sequence[str], left: int) -> list[str]:
    rule = ["---"] * left + ["--:"] * (len(names) - left)
    return [_join(names), "|" + "|".join(rule) + "|"]


def _join(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
