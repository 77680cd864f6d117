"""The recipe: everything that decides what a run produces, in one checked and printable record.

    recipe = Recipe(model="owner/name", method="sparsegpt", nm="2:4", bits=4)
    Recipe.from_yaml("recipe.yaml") == recipe        # after recipe.to_yaml("recipe.yaml")

Every rule that joins two fields is checked here, so that a run which starts can also end.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .errors import UsageError
from .weighting import WEIGHTINGS, check_by_language

# A recipe is a page of text. The cap keeps a wrong file, or one made to exhaust memory, out of the
# parser.
MAX_YAML_BYTES = 1 << 16
_MAX_ALIASES = 16
_MAX_DEPTH = 16

METHODS = ("sparsegpt", "wanda", "magnitude", "ria", "gptq", "rtn", "dense")
PRUNING = ("sparsegpt", "wanda", "magnitude", "ria")
SWEEPING = ("sparsegpt", "gptq")
GROUPS = (0, 32, 64, 128)
PACKED_BITS = (3, 4, 8)  # bits that a kernel reads; other grids are written as dense weights
STANDARD_BITS = (4, 8)  # of them, those that pack-quantized is written with

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)", re.IGNORECASE)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def __init__(self, /, **fields: Any):
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise UsageError(_sentence(type(self), error)) from None


class CalibrationSpec(_Strict):
    """What the calibration statistics are gathered from.

    tokens is the total over all languages, window the tokens per sample (both counted with BOS).
    quotas gives languages tokens of their own (0: leaves one out); the others share what is left.

    weights says how much each language counts in H = sum_l w_l H_l: "proportional" every token as
    much as any other; "equal" every language as much as any other, however many tokens it has;
    {lang: weight} a token of that language as much as `weight` tokens of a language not named;
    "worst" begins like equal and raises, layer after layer, the languages that lose most.
    """

    path: str | None = None
    tokens: Annotated[int, Field(ge=1, le=1 << 40)] = 65536
    window: Annotated[int, Field(ge=2, le=1 << 20)] = 256
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    weights: Literal["equal", "proportional", "worst"] | dict[str, float] = "proportional"
    quotas: dict[str, int] | None = None

    @field_validator("weights", "quotas", mode="before")
    @classmethod
    def _by_language(cls, value: Any, info: ValidationInfo) -> Any:
        """One sentence for each way in which {lang: number} can be wrong."""
        if value is None and info.field_name == "quotas":
            return None
        if isinstance(value, str) and info.field_name == "weights":
            if value not in WEIGHTINGS:
                raise ValueError(
                    f"weights {value!r} is none of {', '.join(WEIGHTINGS)} and no {{language: "
                    "weight}"
                )
            return value
        check_by_language(info.field_name, value)
        return value

    @model_validator(mode="after")
    def _one_window(self) -> CalibrationSpec:
        if self.tokens < self.window:
            raise ValueError(f"{self.tokens} tokens are fewer than one window of {self.window}")
        return self


class Recipe(_Strict):
    """A whole run. UsageError (exit code 2) with one sentence for anything that cannot be done.

    sparsity is the share of pruned weights in [0, 1); nm = "N:M" keeps N of every M consecutive
    inputs. bits 2..8 with one scale per `group` inputs (0 = the whole row). embed_bits 8 rounds
    embedding and output head to int8, one scale per row. skip holds regular expressions that are
    searched in module names.

    symmetric grids have their zero in the middle. None chooses them for pack-quantized, since stock
    transformers load no others as they are, and else asymmetric ones, which fit closer.

    format says how quantised weights are stored: "dense" as ordinary floats, "pack-quantized" as
    stock transformers reads them (4 or 8 bits), "distaya" as only we do (3, 4 or 8 bits,
    bitmasks, int8 embeddings), "auto" the first of pack-quantized and distaya that can say it.
    """

    model: Annotated[str, Field(min_length=1)]
    method: Literal["sparsegpt", "wanda", "magnitude", "ria", "gptq", "rtn", "dense"] = "sparsegpt"
    sparsity: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    nm: str | None = None
    bits: Annotated[int, Field(ge=2, le=8)] | None = None
    embed_bits: Literal[8] | None = None
    format: Literal["auto", "dense", "pack-quantized", "distaya"] = "auto"
    group: int = 128
    symmetric: bool | None = None
    scale: Literal["minmax", "mse"] = "minmax"
    order: Literal["natural", "activation"] = "natural"
    damp: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    calibration: CalibrationSpec = CalibrationSpec()
    max_ram: str | None = None
    skip: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _patterns(cls, fields: Any) -> Any:
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

    @field_validator("nm")
    @classmethod
    def _nm(cls, value: str | None) -> str | None:
        if value is not None:
            parse_nm(value)
        return value

    @field_validator("group")
    @classmethod
    def _group(cls, value: int) -> int:
        if value not in GROUPS:
            raise ValueError(
                f"group {value} is none of {', '.join(map(str, GROUPS))} (0 = the whole row)"
            )
        return value

    @field_validator("max_ram")
    @classmethod
    def _max_ram(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value

    @field_validator("skip")
    @classmethod
    def _skip(cls, value: list[str]) -> list[str]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"skip pattern {pattern!r} is not a regular expression ({error})"
                ) from None
        return value

    @model_validator(mode="after")
    def _together(self) -> Recipe:
        prunes = self.sparsity is not None or self.nm is not None
        if self.sparsity is not None and self.nm is not None:
            raise ValueError(f"give sparsity ({self.sparsity:g}) or nm ({self.nm}), not both")
        if self.method in PRUNING and not prunes:
            raise ValueError(
                f"method {self.method} prunes: say how much, a share such as 0.5 or a pattern "
                "such as 2:4"
            )
        if self.method not in PRUNING and prunes:
            raise ValueError(
                f"method {self.method} does not prune, so sparsity and nm must be left out"
            )
        if self.method in ("gptq", "rtn") and self.bits is None:
            raise ValueError(f"method {self.method} quantises: say to how many bits, from 2 to 8")
        if self.method == "dense" and self.bits is not None:
            raise ValueError(
                f"method dense changes nothing, so bits ({self.bits}) must be left out"
            )
        if self.order == "activation" and (self.method not in SWEEPING or self.nm is not None):
            why = f"pattern {self.nm} is one" if self.nm else f"method {self.method} has no sweep"
            raise ValueError(
                f"order activation is for sparsegpt and gptq without an N:M pattern; {why}"
            )
        self._storable()
        return self

    def _storable(self) -> None:
        """ValueError when the format cannot hold what the recipe makes."""
        if self.embed_bits is not None and self.format in ("dense", "pack-quantized"):
            raise ValueError(
                f"format {self.format} cannot hold an int8 embedding (embed_bits); use distaya"
            )
        packs = self.format in ("pack-quantized", "distaya") or self.embed_bits is not None
        allowed = STANDARD_BITS if self.format == "pack-quantized" else PACKED_BITS
        if packs and self.bits is not None and self.bits not in allowed:
            form = "distaya" if self.format == "auto" else self.format
            raise ValueError(
                f"{self.bits} bits cannot be packed: format {form} holds "
                f"{', '.join(map(str, allowed))} bits; format dense holds any"
            )
        if self.format in ("pack-quantized", "distaya") and not (self.bits or self.embed_bits):
            raise ValueError(f"format {self.format} is for quantised weights: say to how many bits")

    @property
    def nm_pair(self) -> tuple[int, int] | None:
        """(N, M) of the pattern, or None."""
        return None if self.nm is None else parse_nm(self.nm)

    @property
    def max_ram_bytes(self) -> int | None:
        """The memory cap in bytes, or None."""
        return None if self.max_ram is None else parse_size(self.max_ram)

    def to_yaml(self, path: str | os.PathLike | None = None) -> str:
        """The recipe as YAML text, written to `path` as well when one is given."""
        fields = self.model_dump(mode="json")
        text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
        if yaml.safe_load(text) != fields:  # Unicode line breaks survive only as escapes
            text = yaml.safe_dump(fields, sort_keys=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_yaml(cls, path: str | os.PathLike) -> Recipe:
        """Read a recipe file. UsageError names the file and what is wrong in it."""
        fields = read_fields(path)
        try:
            return cls(**fields)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None


def read_fields(path: str | os.PathLike) -> dict[str, Any]:
    """The mapping in a recipe file, not yet checked against the fields (flags may be added)."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_YAML_BYTES + 1)
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"recipe {path} is not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise UsageError(f"recipe {path} cannot be read: {error.strerror}") from None
    if len(raw) > MAX_YAML_BYTES:
        raise UsageError(f"recipe {path} is larger than {MAX_YAML_BYTES} bytes, which no recipe is")
    try:
        _check_shape(text, path)
        fields = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {path} is not plain YAML{_place(error)}") from None
    except ValueError as error:  # a date that is none, a number of thousands of digits
        raise UsageError(f"recipe {path} holds a value that is none: {error}") from None
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise UsageError(
            f"recipe {path} must be a mapping of names to values, not {type(fields).__name__}"
        )
    return fields


class _Loader(yaml.SafeLoader):
    """safe_load that refuses a key given twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key in (k for k, _ in node.value if isinstance(k, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _check_shape(text: str, path: str | os.PathLike) -> None:
    """Stop at the first sign of a document built to exhaust the parser (quadratic in depth)."""
    depth = aliases = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
            event, yaml.CollectionEndEvent
        )
        if depth > _MAX_DEPTH:
            raise UsageError(
                f"recipe {path} is nested deeper than {_MAX_DEPTH} levels, which no recipe is"
            )
        if aliases > _MAX_ALIASES:
            raise UsageError(
                f"recipe {path} has more than {_MAX_ALIASES} YAML aliases, which no recipe needs"
            )


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


def _from_base_60(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 60
    return f"{value // 60}:{value % 60}" if whole else value


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "not understood"
    return (
        f" at line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else f": {problem}"
    )


def _sentence(model: type[BaseModel], error: ValidationError) -> str:
    """One sentence for the first thing wrong, with the closest known key where a key is unknown."""
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"]) or "recipe"
    if first["type"] == "extra_forbidden":
        if model is Recipe and name in CalibrationSpec.model_fields:
            return f"unknown key {name!r}; it stands under calibration"
        near = difflib.get_close_matches(name, model.model_fields, n=1, cutoff=0.5)
        hint = (
            f"did you mean {near[0]!r}?" if near else f"known are {', '.join(model.model_fields)}"
        )
        return f"unknown key {name!r}; {hint}"
    if first["type"] == "missing":
        return f"the recipe lacks {name!r}"
    if first["type"] == "value_error":  # our own sentences
        inner = str(first["ctx"]["error"])
        return f"calibration: {inner}" if name == "calibration" else inner
    reason = first["msg"][0].lower() + first["msg"][1:]
    return f"{name} {repr(first['input'])[:80]} is not usable: {reason}"
