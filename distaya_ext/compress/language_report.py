"""The account of a run by language: tokens, fertility, shares in the statistics, what was lost."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .calibrate import Calibration
from .events import LanguagesDone
from .languages import Account

_COLUMNS = ("layer", "stage", "language", "share", "error", "input_rms", "input_likeness")


@dataclass
class LanguageReport:
    """Filled layer by layer; `languages` of results.json, and languages.csv."""

    weights: str | Mapping[str, float] = "proportional"
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    shares: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, list[float]] = field(default_factory=dict)
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    tokenizer: str | None = None

    @classmethod
    def of(cls, calibration: Calibration, weights: str | Mapping[str, float]) -> LanguageReport:
        """The account of a run that is about to begin."""
        windows = Counter(calibration.languages)
        facts = {
            lang: {
                "windows": count,
                "tokens": count * calibration.ids.shape[1],
                "fertility": calibration.fertility.get(lang),
                "bytes_per_token": calibration.bytes_per_token.get(lang),
                "duplicate_documents": calibration.duplicates.get(lang, 0),
                "empty_documents": calibration.empty.get(lang, 0),
                "one_token_documents": calibration.one_token.get(lang, 0),
            }
            for lang, count in windows.items()
        }
        return cls(weights, facts, tokenizer=calibration.tokenizer)

    def add(self, layer: int, languages: list[str], account: Account) -> LanguagesDone:
        """Note a layer's account, whose tensors are on the host; the event that tells of it."""
        shares = dict(zip(languages, account.shares.tolist(), strict=True))
        errors = {}
        if account.errors is not None:
            errors = dict(zip(languages, account.errors.tolist(), strict=True))
        for lang in languages:
            self.shares.setdefault(lang, []).append(shares[lang])
            if errors:
                self.errors.setdefault(lang, []).append(errors[lang])
        for stage, summary in account.inputs.items():
            for lang, rms, likeness in zip(languages, *summary.tolist(), strict=True):
                self.rows.append(
                    (layer, stage, lang, shares[lang], errors.get(lang), rms, likeness)
                )
        return LanguagesDone(layer, shares, errors)

    def write(self, folder: Path) -> None:
        """languages.csv: a line per layer, stage and language; nothing where no text was read."""
        if not self.rows:
            return
        with open(folder / "languages.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            for *names, share, error, rms, likeness in self.rows:
                numbers = [share, error, rms, likeness]
                writer.writerow([*names, *("" if x is None else f"{x:.6g}" for x in numbers)])

    def summary(self) -> dict[str, Any]:
        """Per language: windows, tokens, fertility (tokens per character), bytes per token, how
        many documents repeat another, are empty or a single token, and by layer its share in the
        statistics and the relative squared error of the hidden states.
        """
        return {
            lang: {
                **facts,
                "share": [round(x, 6) for x in self.shares.get(lang, [])],
                "error": [float(f"{x:.6g}") for x in self.errors.get(lang, [])],
            }
            for lang, facts in self.facts.items()
        }
