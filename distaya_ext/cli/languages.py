"""What --language-weights and --quota take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..weighting import WEIGHTINGS


def parse_weights(text: str) -> str | dict[str, Any]:
    """equal, proportional, worst, a YAML file {language: weight}, or en=2,sw=5."""
    if text in WEIGHTINGS:
        return text
    if Path(text).suffix in (".yaml", ".yml"):
        from ..recipe import read_fields

        return read_fields(text)
    if "=" not in text:
        raise UsageError(
            f"--language-weights {text!r} is none of {', '.join(WEIGHTINGS)}, no .yaml file and "
            "no list such as en=2,sw=5"
        )
    return _pairs("--language-weights", text.split(","), float)


def parse_quotas(texts: list[str]) -> dict[str, Any]:
    """{language: tokens} of every --quota, each en=4096 or several with commas between them."""
    return _pairs("--quota", [part for text in texts for part in text.split(",")], int)


def _pairs(flag: str, parts: list[str], number: type) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in parts:
        lang, _, value = part.strip().partition("=")
        if lang in found:
            raise UsageError(f"{flag} names {lang} twice")
        try:
            found[lang] = number(value)
        except ValueError:
            raise UsageError(
                f"{flag} {part!r} is not a language and a number, such as en=4096"
            ) from None
    return found
