"""What a recipe may say about languages: how much each counts, and how many tokens each gets."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

WEIGHTINGS = ("equal", "proportional", "worst")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*")

MOST_WEIGHT = 1e6  # beyond this the other languages are lost in the rounding of fp32 sums
LEAST_WEIGHT = 1e-6


def check_by_language(field: str, value: Any) -> None:
    """ValueError, in one sentence, unless value is {language: number} as field needs it.

    field: "weights" (0 or 1e-6 to 1e6) or "quotas" (whole numbers from 0). Whether languages have
    texts, and anything is left to calibrate with, only the texts can tell.
    """
    unit = {"weights": "weight", "quotas": "tokens"}[field]
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{field} {str(value)[:80]!r} is no {{language: {unit}}}")
    for lang, number in value.items():
        if isinstance(lang, bool):  # YAML 1.1 reads the code of Norwegian as false
            raise ValueError(f"{field} name a language {lang}; write the code no in quotes: 'no'")
        if not isinstance(lang, str) or not LANGUAGE.fullmatch(lang):
            raise ValueError(f"{field} name {str(lang)[:80]!r}, which is no language code")
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise ValueError(f"{field} give {lang} {str(number)[:80]!r}, which is no number")
        if field == "quotas":
            _check_quota(lang, number)
        else:
            _check_weight(lang, number)


def _check_quota(lang: str, number: float) -> None:
    if number != number or number < 0 or number > 1 << 40 or number != int(number):
        raise ValueError(f"quotas give {lang} {number} tokens; a whole number from 0 is needed")


def _check_weight(lang: str, number: float) -> None:
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"weights give {lang} {number}; a weight must be finite and not negative")
    if number and not LEAST_WEIGHT <= number <= MOST_WEIGHT:
        raise ValueError(
            f"weights give {lang} {number:g}; a weight must be 0 or from {LEAST_WEIGHT:g} to "
            f"{MOST_WEIGHT:g}"
        )


def _weights(value: Any) -> Any:
    if isinstance(value, str):
        if value not in WEIGHTINGS:
            raise ValueError(
                f"weights {value!r} is none of {', '.join(WEIGHTINGS)} and no {{language: weight}}"
            )
    else:
        check_by_language("weights", value)
    return value


def _quotas(value: Any) -> Any:
    if value is not None:
        check_by_language("quotas", value)
    return value


Weights = Annotated[
    Literal["equal", "proportional", "worst"] | dict[str, float], BeforeValidator(_weights)
]
Quotas = Annotated[dict[str, int] | None, BeforeValidator(_quotas)]
