"""The recipe: everything that decides what a run produces, in one checked and printable record.

    recipe = Recipe(model="owner/name", method="sparsegpt", nm="2:4", bits=4)
    Recipe.from_yaml("recipe.yaml") == recipe        # after recipe.to_yaml("recipe.yaml")

Every rule that joins two fields is checked here, so that a run which starts can also end.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from .errors import UsageError
from .recipe_file import MAX_YAML_BYTES, read_fields
from .recipe_parts import (
    GROUPS,
    DassSpec,
    Rule,
    Strict,
    is_16,
    known_group,
    one_pattern,
    parse_nm,
    parse_size,
    parse_sparsity,
    regular,
)
from .weighting import Quotas, Weights

__all__ = [
    "GROUPS",
    "MAX_YAML_BYTES",
    "METHODS",
    "PACKED_BITS",
    "PRUNING",
    "STANDARD_BITS",
    "SWEEPING",
    "CalibrationSpec",
    "DassSpec",
    "Recipe",
    "Rule",
    "parse_nm",
    "parse_size",
    "parse_sparsity",
    "read_fields",
]

METHODS = ("sparsegpt", "wanda", "magnitude", "ria", "dass", "gptq", "rtn", "dense")
PRUNING = ("sparsegpt", "wanda", "magnitude", "ria", "dass")
SWEEPING = ("sparsegpt", "gptq")
PACKED_BITS = (3, 4, 8)  # bits that a kernel reads; other grids are written as dense weights
STANDARD_BITS = (4, 8)  # of them, those that pack-quantized is written with


class CalibrationSpec(Strict):
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
    weights: Weights = "proportional"
    quotas: Quotas = None

    @model_validator(mode="after")
    def _one_window(self) -> CalibrationSpec:
        if self.tokens < self.window:
            raise ValueError(f"{self.tokens} tokens are fewer than one window of {self.window}")
        return self


class Recipe(Strict):
    """A whole run. UsageError (exit code 2) with one sentence for anything that cannot be done.

    sparsity is the share of pruned weights in [0, 1); nm = "N:M" keeps N of every M consecutive
    inputs. bits 2..8 with one scale per `group` inputs (0 = the whole row). embed_bits 8 rounds
    embedding and output head to int8, one scale per row. skip holds regular expressions that are
    searched in module names. bits 16 are the model's own floats, the same as None.

    modules are rules for some Linears; the first that matches one decides, and skip wins over all
    of them. drop_layers are indices of decoder layers of the source model that the written one has
    not; what stays is numbered anew there, while skip and modules mean the numbers of the source.

    symmetric grids have their zero in the middle. None chooses them for pack-quantized, since stock
    transformers load no others as they are, and else asymmetric ones, which fit closer.

    quality says how far sparsegpt and gptq go (None: default): plain is the published sweep;
    default also aims at what the dense model gives, so that later layers make up for the errors of
    earlier ones, and refits the kept weights; high chooses masks by ADMM and then trains the kept
    weights, or the scales, on each layer's output.

    permute lets the neurons of gated MLPs change places (rows of gate and up with columns of down,
    so the model stays the same function) before sparsegpt prunes them to an N:M pattern: then less
    is pruned from any group of down. Method dass has a permute of its own.

    bias_correction lets the biases that a model has take up what compression changed in the mean
    outputs.

    format says how quantised weights are stored: "dense" as ordinary floats, "pack-quantized" as
    stock transformers reads them (4 or 8 bits), "distaya" as only we do (3, 4 or 8 bits,
    bitmasks, int8 embeddings), "auto" the first of pack-quantized and distaya that can say it. With
    rules for modules "auto" takes distaya as soon as one of the matrices is smaller as a bitmask.
    """

    model: Annotated[str, Field(min_length=1)]
    method: Literal["sparsegpt", "wanda", "magnitude", "ria", "dass", "gptq", "rtn", "dense"] = (
        "sparsegpt"
    )
    sparsity: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    nm: str | None = None
    bits: Annotated[int, Field(ge=2, le=8)] | None = None
    embed_bits: Literal[8] | None = None
    format: Literal["auto", "dense", "pack-quantized", "distaya"] = "auto"
    group: int = 128
    symmetric: bool | None = None
    scale: Literal["minmax", "mse"] = "minmax"
    order: Literal["natural", "activation", "group", "block"] = "natural"
    quality: Literal["plain", "default", "high"] | None = None
    damp: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    bias_correction: bool = False
    dass: DassSpec | None = None
    permute: bool = False
    calibration: CalibrationSpec = CalibrationSpec()
    max_ram: str | None = None
    skip: list[str] = Field(default=[])
    modules: list[Rule] = Field(default=[])
    drop_layers: list[Annotated[int, Field(ge=0)]] = Field(default=[])

    @model_validator(mode="before")
    @classmethod
    def _patterns(cls, fields: Any) -> Any:
        fields = one_pattern(fields)
        if isinstance(fields, dict) and is_16(fields.get("bits")):
            fields = fields | {"bits": None}
        if isinstance(fields, dict) and fields.get("method") == "dass":
            fields = fields | {"dass": fields.get("dass") or {}}
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
        return known_group(value)

    @field_validator("max_ram")
    @classmethod
    def _max_ram(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value

    @field_validator("skip")
    @classmethod
    def _skip(cls, value: list[str]) -> list[str]:
        return [regular(pattern, "skip pattern") for pattern in value]

    @field_validator("drop_layers")
    @classmethod
    def _drop(cls, value: list[int]) -> list[int]:
        for index in value:
            if value.count(index) > 1:
                raise ValueError(f"drop_layers names layer {index} twice")
        return sorted(value)

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
        self._dass_fits()
        if self.permute and (self.method != "sparsegpt" or self.nm is None):
            raise ValueError(
                "permute balances the groups of an N:M pattern for method sparsegpt (and, under "
                "dass, for method dass)"
            )
        updates = self.dass is not None and self.dass.update
        if self.quality not in (None, "plain") and self.method not in SWEEPING and not updates:
            raise ValueError(
                f"quality {self.quality} is for sparsegpt and gptq; method {self.method} has no "
                "sweep"
            )
        if self.bias_correction and self.method in ("magnitude", "rtn", "dense"):
            raise ValueError(
                f"bias_correction needs the means of inputs, and method {self.method} looks at no "
                "texts"
            )
        self._rules()
        self._ordered()
        self._storable()
        return self

    def _dass_fits(self) -> None:
        """ValueError when the options of dass do not go with the rest."""
        if self.dass is None:
            return
        if self.method != "dass":
            raise ValueError(f"the options under dass are for method dass, not {self.method}")
        if self.dass.permute and self.nm is None and not self.dass.dense_neurons:
            raise ValueError(
                "permute balances the groups of an N:M pattern and gathers dense_neurons; with a "
                "share and no dense neurons there is nothing to permute"
            )

    def _rules(self) -> None:
        """ValueError for rules that the method has no sweep for."""
        if self.modules and self.method not in SWEEPING:
            raise ValueError(
                f"modules (rules for some Linears) are for {' and '.join(SWEEPING)}, which sweep; "
                f"method {self.method} does not"
            )

    def _ordered(self) -> None:
        """ValueError for an order that does not go with what is pruned, here or by a rule."""
        if self.order == "natural":
            return
        if self.method not in SWEEPING:
            raise ValueError(
                f"order {self.order} is for {' and '.join(SWEEPING)}; method {self.method} has no "
                "sweep"
            )
        ruled = [(f"rule {i} of modules: ", r) for i, r in enumerate(self.modules, 1)]
        for where, part in [("", self), *((w, r) for w, r in ruled if not r.dense)]:
            if self.order == "activation" and part.nm is not None:
                raise ValueError(f"{where}order activation is not for an N:M pattern: {part.nm}")
            if self.order == "group" and part.nm is None:
                raise ValueError(f"{where}order group is for an N:M pattern such as 2:4")
            if self.order == "block" and not part.sparsity:
                raise ValueError(f"{where}order block is for a share of the weights such as 0.5")

    def _storable(self) -> None:
        """ValueError when the format cannot hold what the recipe makes."""
        if self.embed_bits is not None and self.format in ("dense", "pack-quantized"):
            raise ValueError(
                f"format {self.format} cannot hold an int8 embedding (embed_bits); use distaya"
            )
        packs = self.format in ("pack-quantized", "distaya") or self.embed_bits is not None
        allowed = STANDARD_BITS if self.format == "pack-quantized" else PACKED_BITS
        given = {"": self.bits}
        given |= {f"rule {i} of modules: ": rule.bits for i, rule in enumerate(self.modules, 1)}
        for where, bits in given.items():
            if packs and bits is not None and bits not in allowed:
                form = "distaya" if self.format == "auto" else self.format
                raise ValueError(
                    f"{where}{bits} bits cannot be packed: format {form} holds "
                    f"{', '.join(map(str, allowed))} bits; format dense holds any"
                )
        rounds = any(given.values()) or self.embed_bits
        if self.format in ("pack-quantized", "distaya") and not rounds:
            raise ValueError(f"format {self.format} is for quantised weights: say to how many bits")

    @property
    def effort(self) -> str:
        """The quality that is meant: plain, default or high."""
        return self.quality or ("default" if self.method in SWEEPING else "plain")

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
