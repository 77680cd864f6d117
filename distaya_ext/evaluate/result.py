"""What an evaluation found: numbers per language, worst first, for tables, JSON and a gate."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from .gate import check

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

    wrong_script = share of the letters in `continuations` greedy continuations that are outside the
    language's scripts, base_wrong_script the base's, wrong_script_delta their difference with a
    95 % interval over prompts. None where that was not measured.
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
    continuations: int | None = None
    wrong_script: float | None = None
    base_wrong_script: float | None = None
    wrong_script_delta: float | None = None
    wrong_script_interval: Interval | None = None

    @property
    def ppl(self) -> float:
        """exp(nll)."""
        return math.exp(min(self.nll, 700.0))


@dataclass(frozen=True)
class Evaluation:
    """All languages of one model, worst first: by dnll against a base, by nll alone.

    samples: what was written, {"language", "prompt", "base", "model"} each, base None without one;
    written: {"per_language", "new_tokens", "seconds"} of it, None where nothing was.
    """

    model: str
    base: str | None
    languages: list[LanguageResult]
    mode: str  # "windows" or "lines"
    window: int | None
    seconds: float
    notes: list[str] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    written: dict[str, Any] | None = None

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

    @property
    def english(self) -> LanguageResult | None:
        """The result of English, which is printed beside the worst language."""
        return next((r for r in self.languages if r.language.split("-")[0] in ("en", "eng")), None)

    @property
    def worst_script(self) -> LanguageResult | None:
        """The language with most letters in a wrong script, None where that was not measured."""
        known = [r for r in self.languages if r.wrong_script is not None]
        return max(known, key=lambda r: r.wrong_script, default=None)

    def gate(self, **limits: float) -> None:
        """GateError (exit code 6) in one sentence when a limit is broken, see gate.GATES for their
        names: max_worst_ppl_ratio=1.15. UsageError for other names or what cannot be a limit.
        """
        check(self, limits)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, fields that do not apply left out."""
        shown = ("wrong_script", "base_wrong_script")
        rows = [
            {k: value for k, value in asdict(row).items() if value is not None or k in shown}
            | {"ppl": row.ppl}
            for row in self.languages
        ]
        out: dict[str, Any] = {"model": self.model, "mode": self.mode, "nll": self.nll}
        if self.window is not None:
            out["window"] = self.window
        if self.compared:
            out |= {"base": self.base, "base_nll": self.base_nll, "dnll": self.nll - self.base_nll}
            out |= {"worst_language": self.worst.language, "gap": self.gap}
            out["english"] = None if self.english is None else self.english.language
        if self.written is not None:
            out["continuations"] = self.written
        notes = [*self.notes, LIMITS]
        out |= {"languages": rows, "samples": self.samples}
        return out | {"seconds": round(self.seconds, 3), "notes": notes}


def _pooled(rows: list[LanguageResult], name: str) -> float:
    return sum(getattr(row, name) * row.tokens for row in rows) / sum(row.tokens for row in rows)
