"""The account of a run: one line per Linear, totals, and the files that carry them."""

from __future__ import annotations

import csv
import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch

from .proof import Proof

_COLUMNS = (
    "module",
    "shape",
    "loss",
    "relative_loss",
    "sparsity",
    "bits",
    "floored",
    "dead",
    "seconds",
)


@dataclass(frozen=True)
class ModuleReport:
    """One Linear. loss: half the squared output error per token; relative_loss: over the dense
    output.

    floored and dead belong to the stage's shared Hessian; seconds is the stage's time, shared by
    rows. bits is None when the weights were not quantised.
    """

    module: str
    rows: int
    columns: int
    loss: float | None
    relative_loss: float | None
    zeros: int
    bits: int | None
    floored: int
    dead: int
    seconds: float

    @property
    def sparsity(self) -> float:
        return self.zeros / (self.rows * self.columns)


@dataclass
class Report:
    """What compress() returns; layers.csv and results.json are written from it."""

    method: str
    model_type: str
    out: Path
    modules: list[ModuleReport] = field(default_factory=list)
    proof: Proof | None = None
    tokens: int = 0
    window: int = 0
    tokens_per_language: dict[str, int] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    spilled: bool = False
    floored: int = 0  # over all stages, each Hessian counted once
    dead: int = 0
    seconds: float = 0.0

    @property
    def sparsity(self) -> float:
        """Zeros over all weights of the Linears that were compressed."""
        weights = sum(m.rows * m.columns for m in self.modules)
        return sum(m.zeros for m in self.modules) / weights if weights else 0.0

    @property
    def loss(self) -> float | None:
        """Sum of the losses of all Linears, None when no Hessian was taken."""
        known = [m.loss for m in self.modules if m.loss is not None]
        return sum(known) if known else None

    def write(self, folder: Path) -> None:
        """Write layers.csv and results.json into the folder."""
        with open(folder / "layers.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            for m in self.modules:
                writer.writerow(_row(m))
        text = json.dumps(self.summary(), indent=2, ensure_ascii=False)
        (folder / "results.json").write_text(text + "\n", encoding="utf-8")

    def summary(self) -> dict[str, Any]:
        """The content of results.json."""
        import transformers

        from .. import __version__

        return {
            "versions": {
                "distaya_ext": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "safetensors": safetensors.__version__,
                "python": platform.python_version(),
            },
            "method": self.method,
            "model_type": self.model_type,
            "calibration": {
                "tokens": self.tokens,
                "window": self.window,
                "tokens_per_language": self.tokens_per_language,
                "spilled_to_disk": self.spilled,
            },
            "proof": {**asdict(self.proof), "exact": self.proof.exact} if self.proof else None,
            "totals": {
                "modules": len(self.modules),
                "weights": sum(m.rows * m.columns for m in self.modules),
                "zeros": sum(m.zeros for m in self.modules),
                "sparsity": self.sparsity,
                "loss": self.loss,
                "floored": self.floored,
                "dead": self.dead,
                "seconds": round(self.seconds, 3),
            },
            "notices": self.notices,
        }


def _row(m: ModuleReport) -> list[Any]:
    number = [None if v is None else f"{v:.6g}" for v in (m.loss, m.relative_loss)]
    shape = f"{m.rows}x{m.columns}"
    return [
        m.module,
        shape,
        *number,
        f"{m.sparsity:.6f}",
        m.bits,
        m.floored,
        m.dead,
        f"{m.seconds:.4f}",
    ]
