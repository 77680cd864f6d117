"""The quality bench in pictures: delta NLL of every row, and bits per weight beside KL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.quality_rows import PATTERNS
from bench.quality_stats import Figures

_COLOURS = {"textbook": "#7a7a7a", "ours": "#c8451b"}
_COLUMNS = (("50 %", "4:8", "2:4"), ("2:4 + int4", "50 % + int4", "int4", "int3"))


def need() -> None:
    """SystemExit where matplotlib (the extra "bench") is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("pictures need matplotlib: pip install 'distaya-ext[bench]'") from error
    matplotlib.use("Agg")


def draw(found: Sequence[Figures], path: Path) -> list[Path]:
    """Write the dot plot to `path` and, with two sizes or more, the other to <stem>-size.

    Returns what was written. SystemExit when there is nothing to draw, or nothing to draw with.
    """
    if not found:
        raise SystemExit("there is no row to draw")
    need()
    written = [_dots(found, path)]
    packed = [f for f in found if f.row.pattern.bits]
    if len({round(f.bits, 1) for f in packed}) > 1:
        written.append(_sizes(packed, path.with_name(f"{path.stem}-size{path.suffix}")))
    return written


def _dots(found: Sequence[Figures], path: Path) -> Path:
    """A panel per pattern: mean with its interval, the worst language as a hollow diamond."""
    import matplotlib.pyplot as plt

    by = {p: [f for f in found if f.row.pattern.name == p] for p in PATTERNS}
    columns = [[p for p in column if by[p]] for column in _COLUMNS]
    columns = [column for column in columns if column]
    tall = max(sum(len(by[p]) + 2 for p in column) for column in columns)
    figure = plt.figure(figsize=(5.2 * len(columns), 0.27 * tall + 0.8), layout="constrained")
    parts = figure.subfigures(1, len(columns), squeeze=False)[0]
    for part, column in zip(parts, columns, strict=True):
        ratios = [len(by[p]) + 2 for p in column]
        spare = tall - sum(ratios)
        grid = part.add_gridspec(
            len(column) + bool(spare),
            1,
            height_ratios=[*ratios, spare][: len(column) + bool(spare)],
        )
        for place, pattern in enumerate(column):
            _panel(part.add_subplot(grid[place]), pattern, by[pattern])
    figure.suptitle(
        "delta NLL, nats per token: mean of languages with 95 % interval (dots), worst language "
        "(diamonds)",
        fontsize=9,
    )
    return _save(figure, path)


def _panel(axes, pattern: str, rows: Sequence[Figures]) -> None:
    for y, f in enumerate(rows):
        colour = _COLOURS[f.row.side]
        low, high = f.delta_interval
        axes.plot([low, high], [y, y], color=colour, linewidth=2, alpha=0.6)
        axes.plot(f.delta, y, "o", color=colour, markersize=5)
        axes.plot(f.worst, y, "D", color=colour, markersize=4, fillstyle="none")
    axes.set_yticks(range(len(rows)), [f.row.label for f in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(left=min(0.0, *(f.delta_interval[0] for f in rows)))
    axes.set_title(pattern, fontsize=9, loc="left", fontweight="bold")
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _sizes(packed: Sequence[Figures], path: Path) -> Path:
    """Bits per weight and KL of every packed row, named; lower and further left is better."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    places = _apart(packed)
    for f in packed:
        colour = _COLOURS[f.row.side]
        axes.plot(f.bits, f.kl, "o", color=colour, markersize=5)
        axes.annotate(
            f"{f.row.label}, {f.row.pattern.name}",
            (f.bits, f.kl),
            (f.bits + 0.06, places[f.row.key]),
            fontsize=7,
            va="center",
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "relpos": (0, 0.5)},
        )
    axes.set_yscale("log")
    axes.set_xlim(min(f.bits for f in packed) - 0.1, max(f.bits for f in packed) + 0.6)
    axes.set_xlabel("bits per weight on disk")
    axes.set_ylabel("KL(dense || compressed), nats per token")
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _apart(packed: Sequence[Figures]) -> dict[str, float]:
    """Heights for the names by row: near their KL, but no two of a size on top of each other."""
    gap = (max(f.kl for f in packed) / min(f.kl for f in packed)) ** 0.035
    places: dict[str, float] = {}
    last: dict[float, float] = {}
    for f in sorted(packed, key=lambda f: f.kl):
        size = round(f.bits, 1)
        last[size] = places[f.row.key] = max(f.kl, last.get(size, 0.0) * gap)
    return places


def _save(figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
