"""What a chain has made, read from the folder it has written."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import GateError
from ..models.depth import layers_left
from .journal import JOURNAL
from .steps import EVALUATION


@dataclass(frozen=True)
class Step:
    """A step that was done: its time, and what it depended on (inputs, and their fingerprint)."""

    name: str
    seconds: float
    fingerprint: str
    inputs: dict[str, Any]


@dataclass(frozen=True)
class Chained:
    """The result of a chain.

    steps        in the order they were done; kept names those that an earlier run had done
    results      results.json of the compression
    evaluations  step -> what evaluate() found of what it wrote, against the model before, as
                 Evaluation.to_dict gives it; empty where the recipe evaluates nothing
    source_layers  numbers in the source model of the layers that were written
    gate         why the quality gate failed, None: it did not, or there was none
    """

    out: Path
    steps: list[Step]
    results: dict[str, Any]
    kept: list[str] = field(default_factory=list)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    gate: str | None = None
    source_layers: tuple[int, ...] = ()

    @classmethod
    def read(cls, out: Path, kept: Collection[str]) -> Chained:
        """The result in the folder `out`."""
        steps = [Step(**step) for step in _read(out / JOURNAL)["steps"]]
        told = _read(out / EVALUATION) if any(s.name == "evaluate" for s in steps) else {}
        results, depth = (
            _read(out / "results.json"),
            _read(out / "config.json")["num_hidden_layers"],
        )
        gone = results["dropped_layers"]
        return cls(
            out,
            steps,
            results,
            [step.name for step in steps if step.name in kept],
            told.get("steps", {}),
            told.get("gate"),
            layers_left(depth + len(gone), gone),
        )

    @property
    def dropped_layers(self) -> list[int]:
        """Layers of the source model that were left out."""
        return self.results["dropped_layers"]

    @property
    def seconds(self) -> float:
        """What all steps took together, those of earlier runs too."""
        return sum(step.seconds for step in self.steps)

    def check_gate(self) -> None:
        """GateError (exit code 6) when the last step lost more than the recipe allows."""
        if self.gate is not None:
            raise GateError(f"{self.gate}; the result is kept in {self.out}")

    def summary(self) -> dict[str, Any]:
        """Plain values: results.json with steps, evaluations and gate."""
        told = [
            {"name": s.name, "seconds": s.seconds, "kept": s.name in self.kept} for s in self.steps
        ]
        return self.results | {"steps": told, "evaluations": self.evaluations, "gate": self.gate}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
