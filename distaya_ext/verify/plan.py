"""What a run wrote down of each matrix (layers.csv, recipe.yaml), to hold the weights against."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import DistayaError
from ..formats import ModuleScheme
from ..recipe import DassSpec
from .findings import Findings

_PLACES = 6  # decimals of the sparsity in layers.csv


@dataclass(frozen=True)
class Expected:
    """One row of layers.csv. exact: nothing was trained since, so zeros are as many as then.

    dass: how method dass lays its pattern, down: whether the matrix is a down_proj.
    """

    pattern: str | None
    bits: int | None
    sparsity: float
    exact: bool
    dass: DassSpec | None = None
    down: bool = False

    def parts(self, W: Tensor) -> Iterator[tuple[Tensor, int, int, str]]:
        """(part of W, n, m, along): where at most n of m may be kept."""
        if self.pattern is None or ":" not in self.pattern:
            return
        n, m = map(int, self.pattern.split(":"))
        if self.dass is None:
            yield W, n, m, "inputs"
            return
        # The last neurons may be kept whole; they are rows of gate and up, columns of down.
        neurons = W.shape[1] if self.down else W.shape[0]
        live = neurons - int(neurons * self.dass.dense_neurons) // m * m
        if self.down:
            yield W[:, :live], n, m, "inputs"
        else:
            yield W[:live], n, m, self.dass.direction

    def check_zeros(self, name: str, zeros: int, weights: int, found: Findings) -> None:
        share = zeros / max(1, weights)
        off = share - self.sparsity
        slack = 0.6 * 10**-_PLACES
        if off < -slack or (self.exact and off > slack):
            found.add(
                "sparsity",
                name,
                f"{zeros} of {weights} weights are 0, {100 * share:.4f} %; layers.csv says "
                f"{100 * self.sparsity:.4f} %",
            )

    def check_scheme(self, name: str, scheme: ModuleScheme, cols: int, found: Findings) -> None:
        if self.bits is not None and scheme.bits != self.bits:
            found.add("plan", name, f"it has {scheme.bits} bits; layers.csv says {self.bits}")


def expectations(folder: Path, modules: list[str], found: Findings) -> dict[str, Expected]:
    """By module, what layers.csv says; {} where there is none, as in folders of others.

    modules: the Linears of the model. Rows that cannot be read or name no Linear are findings.
    """
    path = folder / "layers.csv"
    if not path.is_file():
        return {}
    plan: dict[str, Expected] = {}
    trained = (folder / "training.json").is_file()
    exact = not trained and _quality(folder) != "high"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        dass = _dass(folder) if any(row["method"] == "dass" for row in rows) else None
        for row in rows:
            bits = int(row["bits"]) if row["bits"] else None
            own = dass if row["method"] == "dass" else None
            down = row["module"].endswith("down_proj")
            plan[row["module"]] = Expected(
                row["pattern"] or None, bits, float(row["sparsity"]), exact, own, down
            )
    except (ValueError, KeyError, TypeError, csv.Error, DistayaError) as error:
        found.add("plan", path.name, f"it cannot be read ({type(error).__name__}: {error})")
        return {}
    known = set(modules)
    for name in [name for name in plan if name not in known]:
        found.add("plan", path.name, f"it names {name[:80]}, which is no Linear of the model")
    return {name: each for name, each in plan.items() if name in known}


def _quality(folder: Path) -> str | None:
    try:
        told = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told.get("quality") if isinstance(told, dict) else None


def _dass(folder: Path) -> DassSpec | None:
    from ..recipe import Recipe, read_fields

    return Recipe(**read_fields(folder / "recipe.yaml")).dass
