"""What single fields of a recipe take: patterns, sizes, groups, and the texts that mean them."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from .errors import UsageError
from .patterns import fault

GROUPS = (0, 32, 64, 128)
METHODS = ("sparsegpt", "wanda", "magnitude", "ria", "dass", "gptq", "rtn", "dense")
PRUNING = ("sparsegpt", "wanda", "magnitude", "ria", "dass")
SWEEPING = ("sparsegpt", "gptq")
PACKED_BITS = (3, 4, 8)  # bits that a kernel reads; other grids are written as dense weights
STANDARD_BITS = (4, 8)  # of them, those that pack-quantized is written with

_LONGEST_PATTERN = 1 << 16  # characters: search writes patterns that name many modules
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)", re.IGNORECASE)


def parse_nm(text: str) -> tuple[int, int]:
    """(N, M) of "N:M", N kept of every M. UsageError unless 0 < N < M <= 32."""
    found = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text)
    n, m = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < n < m <= 32:
        raise UsageError(f"pattern {text!r} is not N:M with 0 < N < M <= 32, such as 2:4")
    return n, m


def parse_size(text: str) -> int:
    """Bytes of "8GiB", "500 MB" and the like. UsageError without a unit or with nothing left."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise UsageError(f"memory size {text!r} is not a number with a unit, such as 8GiB or 500MB")
    unit = found[2].upper()
    size = int(float(found[1]) * (1024 if "I" in unit else 1000) ** "BKMGT".index(unit[0]))
    if size < 1:
        raise UsageError(f"memory size {text!r} leaves no memory at all")
    return size


def parse_sparsity(text: str) -> dict[str, Any]:
    """What --sparsity takes: "2:4" gives {"nm": "2:4"}, "0.5" or "50%" gives {"sparsity": 0.5}."""
    if ":" in text:
        parse_nm(text)
        return {"nm": text}
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise UsageError(
            f"sparsity {text!r} is neither a share such as 0.5 nor a pattern such as 2:4"
        ) from None
    if not 0.0 <= share < 1.0:
        raise UsageError(f"sparsity {text} is outside [0, 1); it is the share of weights to remove")
    return {"sparsity": share}


def one_pattern(fields: Any) -> Any:
    """`sparsity: "2:4"` means nm; an unquoted 2:4 is 124 to YAML 1.1 (base 60)."""
    if not isinstance(fields, dict):
        return fields
    fields = {k: _from_base_60(v) if k in ("sparsity", "nm") else v for k, v in fields.items()}
    share = fields.get("sparsity")
    if isinstance(share, str) and ":" in share:
        if fields.get("nm") is not None:
            raise ValueError(f"give sparsity ({share}) or nm ({fields['nm']}), not both")
        fields |= {"sparsity": None, "nm": share}
    return fields


def is_16(bits: Any) -> bool:
    return isinstance(bits, int) and not isinstance(bits, bool) and bits == 16


def known_group(value: int) -> int:
    if value not in GROUPS:
        raise ValueError(
            f"group {value} is none of {', '.join(map(str, GROUPS))} (0 = the whole row)"
        )
    return value


def regular(pattern: str, what: str) -> str:
    """The pattern; ValueError for one that is none, or that could run for ever."""
    if found := fault(pattern, _LONGEST_PATTERN):
        raise ValueError(f"{what} {pattern[:80]!r} {found}")
    return pattern


def _from_base_60(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 60
    return f"{value // 60}:{value % 60}" if whole else value


def _known(parse: Any) -> AfterValidator:
    """Keeps a text that parse() takes as it is."""

    def check(value: str) -> str:
        parse(value)
        return value

    return AfterValidator(check)


Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Nm = Annotated[str, _known(parse_nm)]
Bits = Annotated[int, Field(ge=2, le=8)]
Group = Annotated[int, AfterValidator(known_group)]
Size = Annotated[str, _known(parse_size)]
