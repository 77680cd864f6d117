"""What students() returns: candidates side by side, and the one to take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .choose import Advice
from .facts import Facts
from .fertility import Tokenized
from .loss import Loss
from .shape import Shape


@dataclass
class Row:
    """One candidate. shape and cut: of one derived from the teacher, and what was cut.

    compute: work per byte of text relative to the teacher's. error: one sentence where the
    candidate could not be read or scored.
    """

    name: str
    shape: Shape | None = None
    cut: str | None = None
    facts: Facts | None = None
    tokenized: Tokenized | None = None
    same_tokenizer: bool | None = None
    fits: bool = False
    loss: Loss | None = None
    compute: float | None = None
    error: str | None = None

    @property
    def flop_per_byte(self) -> float:
        """2 * (parameters inside + head) * tokens per byte."""
        return self.facts.flop_per_token * self.tokenized.tokens_per_byte

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, fields that do not apply left out."""
        found: dict[str, Any] = {"name": self.name, "fits": self.fits}
        if self.shape is not None:
            found |= {"cut": self.cut, "shape": self.shape.to_dict()}
        if self.facts is not None:
            found["config"] = self.facts.to_dict()
        if self.tokenized is not None:
            found |= {
                "tokens_per_byte": self.tokenized.tokens_per_byte,
                "worst_fertility": [x.language for x in self.tokenized.worst()],
                "fertility": {x.language: x.to_dict() for x in self.tokenized.languages},
            }
            if self.facts is not None:
                found["flop_per_byte"] = self.flop_per_byte
        if self.same_tokenizer is not None:
            found["same_tokenizer"] = self.same_tokenizer
            found["route"] = "logits" if self.same_tokenizer else "spans"
        rest = {"compute": self.compute, "error": self.error}
        found |= {key: value for key, value in rest.items() if value is not None}
        if self.loss is not None:
            found["bits_per_byte"] = self.loss.to_dict()
        return found


@dataclass(frozen=True)
class Table:
    """All candidates, the teacher apart, and the advice."""

    budget: int
    teacher: Row | None
    rows: list[Row]
    advice: Advice
    languages: list[str]
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "budget": self.budget,
            "languages": self.languages,
            "teacher": None if self.teacher is None else self.teacher.to_dict(),
            "students": [row.to_dict() for row in self.rows],
            "recommended": self.advice.name,
            "reasons": self.advice.reasons,
            "changes": self.advice.changes,
            "notes": self.notes,
        }
