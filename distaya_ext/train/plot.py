"""The course of a training as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plot_losses(metrics: Path, folder: Path) -> list[Path]:
    """loss.png and loss.svg in the folder: loss of every step, and on held-out text.

    The same numbers give the same SVG. Needs matplotlib.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    steps = [line for line in lines if "loss" in line]
    held = [line for line in lines if "held_out" in line]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    if steps:
        x, y = [line["step"] for line in steps], [line["loss"] for line in steps]
        axes.plot(x, y, color="#8fb3d9", linewidth=0.8, label="training, each step")
    if held:
        x = [line["step"] for line in held]
        y = [line["held_out"]["loss"] for line in held]
        axes.plot(x, y, "o-", color="#b5401f", label="held-out text")
        best = min(range(len(y)), key=y.__getitem__)
        axes.annotate(f"{y[best]:.3f}", (x[best], y[best]), (0, 6), textcoords="offset points")
    axes.set(xlabel="optimiser step", ylabel="loss per label")
    axes.grid(alpha=0.3)
    if steps or held:
        axes.legend()
    paths = [folder / "loss.png", folder / "loss.svg"]
    with rc_context({"svg.hashsalt": "distaya"}):
        figure.savefig(paths[0], dpi=120, metadata={"Software": None})
        figure.savefig(paths[1], metadata={"Date": None})
    return paths
