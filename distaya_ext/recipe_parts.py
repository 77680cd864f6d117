"""What recipes are made of: strict records with one-sentence errors, rules, patterns and sizes."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from .errors import UsageError

GROUPS = (0, 32, 64, 128)

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)", re.IGNORECASE)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def __init__(self, /, **fields: Any):
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise UsageError(_sentence(type(self), error)) from None


class Rule(Strict):
    """What modules get instead of the recipe's own pattern, all of it.

    match is a regular expression searched in full module names of the source model. sparsity or nm
    with or without bits, or bits alone, as in Recipe; group None is the recipe's. What a rule
    leaves out is not done: bits=4 in a recipe that prunes means quantised and not pruned. bits 16
    are the model's own floats, so bits=16 alone, like dense=True, leaves the modules as they are.

    A module with sparsity or nm is swept as by sparsegpt, one with bits alone as by gptq.
    """

    match: str
    sparsity: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    nm: str | None = None
    bits: Annotated[int, Field(ge=2, le=8)] | None = None
    group: int | None = None
    dense: bool = False

    @model_validator(mode="before")
    @classmethod
    def _patterns(cls, fields: Any) -> Any:
        fields = one_pattern(fields)
        if isinstance(fields, dict) and is_16(fields.get("bits")):
            alone = fields.get("sparsity") is None and fields.get("nm") is None
            fields = fields | {"bits": None} | ({"dense": True} if alone else {})
        return fields

    @field_validator("match")
    @classmethod
    def _match(cls, value: str) -> str:
        return regular(value, "match")

    @field_validator("nm")
    @classmethod
    def _nm(cls, value: str | None) -> str | None:
        if value is not None:
            parse_nm(value)
        return value

    @field_validator("group")
    @classmethod
    def _group(cls, value: int | None) -> int | None:
        return value if value is None else known_group(value)

    @model_validator(mode="after")
    def _together(self) -> Rule:
        if self.sparsity is not None and self.nm is not None:
            raise ValueError(f"give sparsity ({self.sparsity:g}) or nm ({self.nm}), not both")
        numbers = ("sparsity", "nm", "bits", "group")
        given = [name for name in numbers if getattr(self, name) is not None]
        if self.dense and given:
            raise ValueError(
                f"dense: true leaves the modules as they are, so {' and '.join(given)} must be "
                "left out"
            )
        if not self.dense and not {"sparsity", "nm", "bits"} & set(given):
            raise ValueError("it says nothing: give sparsity, nm or bits, or dense: true")
        if self.group is not None and self.bits is None:
            raise ValueError(f"group {self.group} is for scales, so it needs bits")
        return self

    @model_serializer
    def _said(self) -> dict[str, Any]:
        """Only what is said: a recipe may hold hundreds of rules."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return {n: value for n, value in fields.items() if value is not None and value is not False}

    @property
    def nm_pair(self) -> tuple[int, int] | None:
        """(N, M) of the pattern, or None."""
        return None if self.nm is None else parse_nm(self.nm)

    @property
    def prunes(self) -> bool:
        """Whether it removes weights."""
        return self.sparsity is not None or self.nm is not None


class DassSpec(Strict):
    """How method dass prunes gated MLPs.

    alpha: power of a neuron's activation norm in the scores of gate and up. direction: what the
    patterns of gate and up run along, "outputs" (neurons, as published) or "inputs" (as sparse
    tensor cores read them). update: the kept weights make up for the pruned ones in a sweep, which
    along inputs chooses them, too (there a neuron's norm is a factor of the whole row).
    permute: neurons change places (the model stays the same function) so that N:M groups are
    balanced and dense neurons stand at the end. dense_neurons: share of the neurons whose rows of
    gate and up and columns of down stay dense.
    """

    alpha: Annotated[float, Field(ge=0.0, le=4.0)] = 0.5
    direction: Literal["outputs", "inputs"] = "outputs"
    update: bool = False
    dense_neurons: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    permute: bool = False

    @model_validator(mode="after")
    def _contiguous(self) -> DassSpec:
        if self.dense_neurons and not self.permute:
            raise ValueError(
                f"dense_neurons ({self.dense_neurons:g}) stand together at the end of the MLP, so "
                "they need permute: true"
            )
        return self


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
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what} {pattern!r} is not a regular expression ({error})") from None
    return pattern


def _from_base_60(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 60
    return f"{value // 60}:{value % 60}" if whole else value


def _sentence(model: type[BaseModel], error: ValidationError) -> str:
    """One sentence for the first thing wrong, with the closest known key where a key is unknown."""
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"]) or "recipe"
    if first["loc"][:1] == ("modules",) and len(first["loc"]) > 1:
        name = f"rule {int(first['loc'][1]) + 1} of modules"
    if first["type"] == "extra_forbidden":
        for under, field in model.model_fields.items():
            if name in getattr(field.annotation, "model_fields", ()):
                return f"unknown key {name!r}; it stands under {under}"
        near = difflib.get_close_matches(name, model.model_fields, n=1, cutoff=0.5)
        hint = (
            f"did you mean {near[0]!r}?" if near else f"known are {', '.join(model.model_fields)}"
        )
        return f"unknown key {name!r}; {hint}"
    if first["type"] == "missing":
        return f"{'it' if model is Rule else 'the recipe'} lacks {name!r}"
    if first["type"] == "value_error":  # our own sentences
        inner = str(first["ctx"]["error"])
        nested = name in ("calibration", "dass") or name.startswith("rule ")
        return f"{name}: {inner}" if nested else inner
    reason = first["msg"][0].lower() + first["msg"][1:]
    return f"{name} {repr(first['input'])[:80]} is not usable: {reason}"
