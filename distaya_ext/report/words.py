"""Numbers and strangers' texts as a page may show them."""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePosixPath, PureWindowsPath
from typing import NamedTuple

_LONGEST = 1500  # characters shown of a sample
# What forces a direction on the text behind it. Joiners and single marks (ZWNJ, RLM) are writing.
_OVERRIDES = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def clean(text: str, longest: int | None = None) -> str:
    """A stranger's text as something to read: control characters, lone surrogates and overrides of
    the direction become visible marks, and what is beyond `longest` is counted instead.
    """
    more = 0 if longest is None else max(0, len(text) - longest)
    found = "".join(map(_visible, text[:longest] if more else text))
    return f"{found} … ({more} more characters)" if more else found


def _visible(letter: str) -> str:
    code = ord(letter)
    if letter in "\n\t":
        return letter
    if code < 0x20:
        return chr(0x2400 + code)
    kind = unicodedata.category(letter)
    if letter in _OVERRIDES or kind in ("Cc", "Cs") or code & 0xFFFE == 0xFFFE:
        return f"⟨U+{code:04X}⟩"
    return letter


class Parted(NamedTuple):
    """A continuation: what both models say first, and where this one goes its own way."""

    same: str
    own: str


def parted(text: str, other: str | None) -> Parted:
    """Cut where two continuations part, at the start of a word where words have spaces."""
    text = _joined(text)
    if other is None:
        return Parted("", text)
    other = _joined(other)
    if text == other:
        return Parted(text, "")
    pairs = enumerate(zip(text, other, strict=False))
    same = text[: next((i for i, (mine, its) in pairs if mine != its), len(text))]
    space = max(same.rfind(" "), same.rfind("\n"))
    if space >= 0 and len(same) - space < 24:  # Thai or Japanese: no word to go back to
        same = same[: space + 1]
    return Parted(same, text[len(same) :])


def _joined(text: str) -> str:
    """Readable, without blank lines and spaces around it."""
    return clean(re.sub(r"\s*\n\s*", "\n", text.strip()), _LONGEST)


def plain_name(name: str) -> str:
    """A model or a folder without the way to it: a page is for others to read. A hub id stays."""
    text = clean(name, 200)
    away = text.startswith(("/", "~", "..", "./")) or text.count("/") > 1
    if away or re.match(r"[A-Za-z]:[\\/]|\\\\", text):
        windows = "\\" in text
        return (PureWindowsPath(text) if windows else PurePosixPath(text)).name or "a local folder"
    return text


def pathless(text: str) -> str:
    """A sentence whose absolute paths are cut to their last part."""
    return re.sub(r"(?<![\w.:/])~?/(?:[^\s/;,'\"]+/)+([^\s/;,'\"]*)", r"\1", text)


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number with a real minus sign, an en dash where there is none."""
    if value is None:
        return "–"
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    if not float(text.replace(",", "")):
        text = text.replace("-", "+" if sign else "")
    return text.replace("-", "−")


def interval(pair: tuple[float, float] | None, digits: int = 3, sign: bool = True) -> str:
    """low to high."""
    if pair is None:
        return "–"
    return f"{number(pair[0], digits, sign)} to {number(pair[1], digits, sign)}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage, an en dash where there is none."""
    return "–" if share is None else f"{number(100 * share, digits)} %"


def significant(value: float | None, digits: int = 3) -> str:
    """A number of any size, such as 0.0123, 4.56 or 12,300."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    places = max(0, digits - 1 - int(f"{value:e}".partition("e")[2]))
    return number(value, places)


def count(value: int) -> str:
    """12,345."""
    return f"{value:,}"


def duration(seconds: float) -> str:
    """5.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def bytes_text(value: float) -> str:
    """Bytes in the unit that fits."""
    from ..cli.output import size

    return size(value)
