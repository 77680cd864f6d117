"""The account of a run: one line per Linear, totals, and the files that carry them."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..measure import clock
from ..runtime.paths import lesser_isa
from ..versions import versions
from .events import StageDone
from .fallbacks import EVERYWHERE, Fallback, Fallbacks, of_module
from .language_report import LanguageReport
from .proof import Proof
from .settings import Settings
from .solve import Figures

_COLUMNS = (
    "module",
    "shape",
    "loss",
    "relative_loss",
    "sparsity",
    "bits",
    "bytes",
    "bits_per_weight",
    "floored",
    "dead",
    "fallbacks",
    "method",
    "pattern",
    "source_layer",
    "seconds",
)


@dataclass(frozen=True)
class ModuleReport:
    """One Linear. loss: half the squared output error per token; relative_loss: over the dense
    output.

    floored and dead belong to the stage's shared Hessian; seconds is the time of the stack that the
    module was solved in, shared by rows. bits is None when the weights were not quantised, pattern
    ("2:4", "0.5") when they were not pruned. bytes is what the module takes on disk, scales and
    all. module is the name that is written, source_layer the layer's number in the source model.
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
    bytes: int = 0
    method: str = ""
    pattern: str | None = None
    source_layer: int = 0

    @property
    def sparsity(self) -> float:
        return self.zeros / (self.rows * self.columns)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / (self.rows * self.columns)


@dataclass
class Report:
    """What compress() returns; layers.csv and results.json are written from it.

    fallbacks: where something lesser than asked was done; a degraded one ends a strict run.
    left_out: numbers of the calibration windows that were, see left_out.py.
    """

    method: str
    model_type: str
    out: Path
    bits: int | None = None
    modules: list[ModuleReport] = field(default_factory=list)
    proof: Proof | None = None
    tokens: int = 0
    window: int = 0
    tokens_per_language: dict[str, int] = field(default_factory=dict)
    languages: LanguageReport = field(default_factory=LanguageReport)
    notices: list[str] = field(default_factory=list)
    spilled: bool = False
    floored: int = 0  # over all stages, each Hessian counted once
    dead: int = 0
    quality: str = "plain"
    trained: dict[int, dict[str, float]] = field(default_factory=dict)  # by layer: reconstruct()
    seconds: float = 0.0
    format: str = "dense"
    ends: dict[str, dict[str, Any]] = field(default_factory=dict)  # embedding and head
    predicted_bytes: int = 0  # of the weight files, from shapes and schemes
    file_bytes: int = 0
    dropped_layers: list[int] = field(default_factory=list)  # of the source model
    source_layers: tuple[int, ...] = ()  # numbers in the source model of the layers written
    fallbacks: Fallbacks = field(default_factory=Fallbacks)
    left_out: list[int] = field(default_factory=list)
    strict: bool = False
    machine: dict[str, Any] = field(default_factory=dict)  # what the run ran on
    parts: int = 1  # that the statistics were summed in
    ranks: list[dict[str, Any]] = field(default_factory=list)  # of the last run, see shared.told

    def account_end(self, name: str, rows: int, columns: int, bits: int, size: int) -> None:
        """Note what the embedding or the head takes on disk."""
        per_weight = 8 * size / (rows * columns)
        shape = f"{rows}x{columns}"
        self.ends[name] = {
            "shape": shape, "bits": bits, "bytes": size, "bits_per_weight": per_weight
        }  # fmt: skip

    def account(
        self,
        layer: int,
        prefix: str,
        shapes: dict[str, tuple[int, int]],
        settings: Settings,
        figures: Figures,
        seconds: float,
        sizes: list[int],
        *,
        again: bool = False,
    ) -> StageDone:
        """Add one solved stack, a line per Linear, and return the event that tells of it.

        shapes: of the Linears by name, in the order their rows are stacked. figures: on the host.
        sizes: bytes on disk. again: another stack of the same Hessian was accounted before.
        """
        floored, dead = int(figures.floored), int(figures.dead)
        if not again:
            self.floored += floored
            self.dead += dead
        total, row = len(figures.zeros), 0
        for (name, (rows, columns)), size in zip(shapes.items(), sizes, strict=True):
            part = slice(row, row + rows)
            row += rows
            loss, relative = _losses(figures, part)
            module = f"{prefix}.{name}"
            self._fall_back(module, columns, settings, floored, dead)
            self.modules.append(
                ModuleReport(
                    module=module,
                    rows=rows,
                    columns=columns,
                    loss=loss,
                    relative_loss=relative,
                    zeros=int(figures.zeros[part].sum()),
                    bits=settings.bits,
                    floored=floored,
                    dead=dead,
                    seconds=seconds * rows / total,
                    bytes=size,
                    method=settings.method,
                    pattern=settings.pattern,
                    source_layer=self.source_layers[layer] if self.source_layers else layer,
                )
            )
        self.judge()  # now that all Linears of the stack are counted
        loss, relative = _losses(figures, slice(None))
        sparsity = int(figures.zeros.sum()) / (total * columns)
        names = tuple(shapes)
        return StageDone(layer, names, loss, relative, sparsity, floored, dead, seconds)

    def _fall_back(
        self, module: str, columns: int, settings: Settings, floored: int, dead: int
    ) -> None:
        learns, aims = settings.statistic is not None, settings.aims
        self.fallbacks.found += of_module(
            module, columns, self.tokens, floored=floored, dead=dead, learns=learns, aims=aims
        )

    def fall_back(self, found: Fallback) -> None:
        """Note it. NumericsError where it is degraded and the run strict."""
        self.fallbacks.found.append(found)
        self.judge()

    def judge(self) -> None:
        """NumericsError when the run is strict and something is degraded, whoever noted it."""
        if self.strict:
            self.fallbacks.refuse()

    def note_training(self, layer: int, prefix: str, trained: dict[str, torch.Tensor]) -> None:
        """What reconstruct() returned of a layer that was to be trained, on the host."""
        found = {key: float(value) for key, value in trained.items()}
        if not found:
            what = "fewer than 8 calibration windows, or columns in activation order"
            self.fall_back(Fallback(prefix, "untrained", 1, what, True))
            return
        self.trained[layer] = found
        if not found["after"] < found["before"]:
            what = "nothing better was found"
            self.fall_back(Fallback(prefix, "untrained", 1, what, False))

    def fall_back_on_kernels(self, device: torch.device) -> None:
        """Count all modules as slow where the CPU kernels run below what the processor offers."""
        self.machine = _machine(device)
        what = lesser_isa() if device.type == "cpu" else None
        if what is not None:
            self.fall_back(Fallback(EVERYWHERE, "slow_kernel", len(self.modules), what, False))

    @property
    def sparsity(self) -> float:
        """Zeros over all weights of the Linears that were compressed."""
        weights = sum(m.rows * m.columns for m in self.modules)
        return sum(m.zeros for m in self.modules) / weights if weights else 0.0

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk per weight of the Linears that were compressed, scales and all."""
        weights = sum(m.rows * m.columns for m in self.modules)
        return 8 * sum(m.bytes for m in self.modules) / weights if weights else 0.0

    @property
    def loss(self) -> float | None:
        """Sum of the losses of all Linears, None when no Hessian was taken."""
        known = [m.loss for m in self.modules if m.loss is not None]
        return sum(known) if known else None

    def write(self, folder: Path) -> None:
        """Write layers.csv, languages.csv and results.json into the folder."""
        with open(folder / "layers.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            for m in self.modules:
                writer.writerow(_row(m, self.fallbacks.of(m.module)))
        self.languages.write(folder)
        text = json.dumps(self.summary(), indent=2, ensure_ascii=False)
        (folder / "results.json").write_text(text + "\n", encoding="utf-8")

    def summary(self) -> dict[str, Any]:
        """The content of results.json."""
        return {
            "versions": versions(),
            "machine": self.machine,
            "method": self.method,
            "quality": self.quality,
            "model_type": self.model_type,
            "dropped_layers": self.dropped_layers,
            "calibration": {
                "tokens": self.tokens,
                "window": self.window,
                "tokenizer": self.languages.tokenizer,
                "tokens_per_language": self.tokens_per_language,
                "weights": self.languages.weights,
                "languages": self.languages.summary(),
                "spilled_to_disk": self.spilled,
                "parts": self.parts,
            },
            "proof": {**asdict(self.proof), "exact": self.proof.exact} if self.proof else None,
            "totals": {
                "modules": len(self.modules),
                "weights": sum(m.rows * m.columns for m in self.modules),
                "zeros": sum(m.zeros for m in self.modules),
                "sparsity": self.sparsity,
                "loss": self.loss,
                "bytes": sum(m.bytes for m in self.modules),
                "bits_per_weight": self.bits_per_weight,
                "floored": self.floored,
                "dead": self.dead,
                "seconds": round(self.seconds, 3),
            },
            "size": {
                "format": self.format,
                "predicted_bytes": self.predicted_bytes,
                "file_bytes": self.file_bytes,
                "ends": self.ends,
            },
            "reconstruction": {str(layer): each for layer, each in self.trained.items()},
            "fallbacks": self.fallbacks.summary(len(self.modules)),
            "notices": self.notices,
            "ranks": self.ranks,
        }


def dump_report(report: Report) -> dict[str, Any]:
    """All fields of a report but where it goes, as plain values."""
    found = _adapter().dump_python(report, mode="json")
    del found["out"]
    return found


def restore_report(report: Report, told: dict[str, Any]) -> None:
    """Give a report the fields that dump_report gave. Whether to be strict is this run's say."""
    held = _adapter().validate_python({**told, "out": report.out})
    for each in fields(report):
        if each.name not in ("out", "strict"):
            setattr(report, each.name, getattr(held, each.name))


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Report)


def _machine(device: torch.device) -> dict[str, Any]:
    """Names of the processor and, where it did the work, of the GPU."""
    told = clock.machine()
    found = {key: told[key] for key in ("cpu", "cores")}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _losses(figures: Figures, rows: slice) -> tuple[float | None, float | None]:
    """Loss of some rows and its share of the dense output's energy over those rows where that is
    known, (None, None) when no Hessian was taken.
    """
    if figures.loss is None:
        return None, None
    loss, energy = figures.loss[rows], figures.energy[rows]
    known = ~energy.isnan()
    total = float(energy[known].sum())
    return float(loss.sum()), float(loss[known].sum()) / total if total > 0 else 0.0


def _row(m: ModuleReport, fallbacks: str) -> list[Any]:
    number = [None if v is None else f"{v:.6g}" for v in (m.loss, m.relative_loss)]
    shape = f"{m.rows}x{m.columns}"
    return [
        m.module,
        shape,
        *number,
        f"{m.sparsity:.6f}",
        m.bits,
        m.bytes,
        f"{m.bits_per_weight:.6f}",
        m.floored,
        m.dead,
        fallbacks,
        m.method,
        m.pattern,
        m.source_layer,
        f"{m.seconds:.4f}",
    ]
