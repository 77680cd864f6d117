"""What an evaluation found: numbers per language, worst first, for tables, JSON and a gate."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import GateError

Interval = tuple[float, float]

LIMITS = (
    "Perplexity, KL and agreement measure how the model changed on this text; they do not "
    "replace human "
    "evaluation: for Japanese it once found a loss of 16 % where automatic metrics saw 1.7 % "
    "(Marchisio et al. 2024)."
)


@dataclass(frozen=True)
class LanguageResult:
    """One language. nll in nats per token; every field from base_nll on is None without a base.

    dnll = nll - base_nll with a 95 % interval over samples; kl = mean KL(base || model) in nats per
    token and kl_p99 its 99th percentile; agreement = share of tokens with the base's first choice.
    sentence_dnll = dnll in nats per sentence, and over_english that minus the same of English,
    sentence by sentence (parallel lines only).
    """

    language: str
    samples: int
    tokens: int
    nll: float
    bits_per_byte: float
    nll_interval: Interval | None = None
    base_nll: float | None = None
    base_bits_per_byte: float | None = None
    dnll: float | None = None
    dnll_interval: Interval | None = None
    ppl_ratio: float | None = None
    kl: float | None = None
    kl_p99: float | None = None
    agreement: float | None = None
    sentence_dnll: float | None = None
    over_english: float | None = None
    over_english_interval: Interval | None = None

    @property
    def ppl(self) -> float:
        """exp(nll)."""
        return math.exp(min(self.nll, 700.0))


@dataclass(frozen=True)
class Evaluation:
    """All languages of one model, worst first: by dnll against a base, by nll alone."""

    model: str
    base: str | None
    languages: list[LanguageResult]
    mode: str  # "windows" or "lines"
    window: int | None
    seconds: float
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, language: str) -> LanguageResult:
        for result in self.languages:
            if result.language == language:
                return result
        raise KeyError(language)

    @property
    def compared(self) -> bool:
        """Whether there is a base."""
        return self.base is not None

    @property
    def nll(self) -> float:
        """Mean over all tokens of all languages, nats."""
        return _pooled(self.languages, "nll")

    @property
    def base_nll(self) -> float | None:
        """The base's mean over the same tokens, nats."""
        return _pooled(self.languages, "base_nll") if self.compared else None

    @property
    def worst(self) -> LanguageResult:
        """The language that lost most."""
        return self.languages[0]

    @property
    def gap(self) -> float | None:
        """Worst-language gap: max dnll - median dnll over languages, nats per token."""
        if not self.compared:
            return None
        return self.worst.dnll - statistics.median(r.dnll for r in self.languages)

    def gate(
        self, *, max_worst_ppl_ratio: float | None = None, max_gap: float | None = None
    ) -> None:
        """GateError (exit code 6) when the worst language lost more than allowed. Needs a base."""
        worst, failed = self.worst, []
        if max_worst_ppl_ratio is not None and not worst.ppl_ratio <= max_worst_ppl_ratio:
            failed.append(
                f"the worst language {worst.language} has {worst.ppl_ratio:.4f} times the "
                "perplexity "
                f"({max_worst_ppl_ratio:g} allowed)"
            )
        if max_gap is not None and not self.gap <= max_gap:
            failed.append(
                f"the gap between {worst.language} and the median is {self.gap:.4f} nats "
                f"({max_gap:g} allowed)"
            )
        if failed:
            raise GateError("quality gate failed: " + " and ".join(failed))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, fields that do not apply left out."""
        rows = [
            {key: value for key, value in asdict(row).items() if value is not None}
            | {"ppl": row.ppl}
            for row in self.languages
        ]
        out: dict[str, Any] = {"model": self.model, "mode": self.mode, "nll": self.nll}
        if self.window is not None:
            out["window"] = self.window
        if self.compared:
            out |= {"base": self.base, "base_nll": self.base_nll, "dnll": self.nll - self.base_nll}
            out |= {"worst_language": self.worst.language, "gap": self.gap}
        notes = [*self.notes, LIMITS]
        return out | {"languages": rows, "seconds": round(self.seconds, 3), "notes": notes}


def _pooled(rows: list[LanguageResult], name: str) -> float:
    return sum(getattr(row, name) * row.tokens for row in rows) / sum(row.tokens for row in rows)
