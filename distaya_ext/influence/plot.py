"""Scores of layers as a picture: a panel per score, and a map of languages by layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from .candidate import PARTS
from .scores import MEANING, Scores

_MEAN, _EACH, _DROPPED = "#c8451b", "#9a9a9a", "#f3d9cf"
_STYLES = {"layer": "-", "attention": "--", "MLP": ":"}
_SPREAD = 8.0  # where the largest value is more than this many medians, axes are logarithmic


def need() -> None:
    """UsageError where matplotlib (the extra "train") is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("--plot needs matplotlib: pip install 'distaya-ext[train]'") from error
    matplotlib.use("Agg")


def draw(scores: Scores, path: Path, *, title: str, dropped: list[int] | None = None) -> None:
    """Write the picture to `path` (a PNG). dropped: layers to mark.

    Thin lines are languages and the thick one their mean; parts of layers are dashed and dotted.
    The map shows the last of the scores, which is the one that says most.
    """
    need()
    import matplotlib.pyplot as plt

    names = [name for name in MEANING if name in scores.tables]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    tall = 0.17 * len(scores.languages.names) + 1.4
    figure = plt.figure(figsize=(4.2 * columns, 2.6 * rows + tall), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[2.6 * rows, tall])
    grid = above.subplots(rows, columns, squeeze=False).ravel()
    for axes, name in zip(grid, names, strict=False):
        _lines(axes, scores, name, dropped or [])
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    if "attention" in {who.kind for who in scores.candidates}:
        grid[0].legend(fontsize=7, frameon=False)
    _map(below, scores, names[-1], dropped or [])
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _rows(scores: Scores, kind: str) -> list[int]:
    return [i for i, who in enumerate(scores.candidates) if who.kind == kind]


def _lines(axes: Any, scores: Scores, name: str, dropped: list[int]) -> None:
    table, rows = scores.tables[name], _rows(scores, "layer")
    layers = [scores.candidates[i].layer for i in rows]
    for layer in dropped:
        axes.axvspan(layer - 0.5, layer + 0.5, color=_DROPPED, linewidth=0)
    for column in table[rows].T:
        axes.plot(layers, column, color=_EACH, linewidth=0.6, alpha=0.6)
    for kind in ("layer", *PARTS):
        if found := _rows(scores, kind):
            axes.plot(
                layers, scores.mean(name)[found], _STYLES[kind], color=_MEAN, label=kind,
                marker="o" if kind == "layer" else None, markersize=3.5, linewidth=1.8,
            )  # fmt: skip
    usual = float(np.median(np.abs(table)))
    if float(table.max()) > _SPREAD * usual > 0:
        if float(table.min()) > 0:
            axes.set_yscale("log")
        else:
            axes.set_yscale("symlog", linthresh=usual)
    axes.set_xticks(*_ticks(layers))
    axes.set_title(f"{name}: {MEANING[name]}", fontsize=8, loc="left")
    axes.tick_params(labelsize=7)
    axes.minorticks_off()
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _map(figure: Any, scores: Scores, name: str, dropped: list[int]) -> None:
    from matplotlib.colors import LogNorm

    rows = _rows(scores, "layer")
    layers = [scores.candidates[i].layer for i in rows]
    table = scores.tables[name][rows]
    order = np.argsort(-table.mean(axis=0), kind="stable")  # the language hit hardest on top
    axes = figure.subplots()
    wide = table.min() > 0 and table.max() > _SPREAD * np.median(table)
    norm = LogNorm() if wide else None
    image = axes.imshow(table.T[order], aspect="auto", cmap="viridis", norm=norm)
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01).ax.tick_params(
        labelsize=7, which="both"
    )
    axes.set_yticks(range(len(order)), [scores.languages.names[i] for i in order], fontsize=6.5)
    labels = [f"{layer}*" if layer in dropped else str(layer) for layer in layers]
    axes.set_xticks(range(len(layers)), labels, fontsize=7)
    starred = ", * goes" if dropped else ""
    axes.set_title(f"{name} per language and layer{starred}", fontsize=8, loc="left")


def _ticks(layers: list[int]) -> tuple[list[int], list[str]]:
    step = -(-len(layers) // 16)
    shown = layers[::step]
    return shown, [str(layer) for layer in shown]
