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
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from .errors import UsageError
from .recipe_chain import DropSpec, EvaluateSpec, HealSpec, read_drop, read_evaluate, read_heal
from .recipe_checks import check_together
from .recipe_fields import (
    GROUPS,
    METHODS,
    PACKED_BITS,
    PRUNING,
    STANDARD_BITS,
    SWEEPING,
    Bits,
    Group,
    Nm,
    Share,
    Size,
    is_16,
    one_pattern,
    parse_nm,
    parse_size,
    parse_sparsity,
    regular,
)
from .recipe_file import MAX_YAML_BYTES, read_fields
from .recipe_parts import CalibrationSpec, DassSpec, Rule, Strict

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
    "DropSpec",
    "EvaluateSpec",
    "HealSpec",
    "Recipe",
    "Rule",
    "parse_nm",
    "parse_size",
    "parse_sparsity",
    "read_fields",
]

_OF_CHAINS = ("heal", "evaluate")  # fields that a recipe without them does not write

_Skip = Annotated[str, AfterValidator(lambda value: regular(value, "skip pattern"))]


class Recipe(Strict):
    """A whole run. UsageError (exit code 2) with one sentence for anything that cannot be done.

    sparsity is the share of pruned weights in [0, 1); nm = "N:M" keeps N of every M consecutive
    inputs. bits 2..8 with one scale per `group` inputs (0 = the whole row). embed_bits 8 rounds
    embedding and output head to int8, one scale per row. skip holds regular expressions that are
    searched in module names. bits 16 are the model's own floats, the same as None.

    modules are rules for some Linears; the first that matches one decides, and skip wins over all
    of them. drop_layers are indices of decoder layers of the source model that the written one has
    not; what stays is numbered anew there, while skip and modules mean the numbers of the source.
    Instead of indices it may say how many, and they are chosen by score (DropSpec).

    heal trains what was compressed and evaluate measures it; with either, or with layers that are
    chosen, the run is a chain of steps in this order: drop, compress, heal, evaluate.

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
    sparsity: Share | None = None
    nm: Nm | None = None
    bits: Bits | None = None
    embed_bits: Literal[8] | None = None
    format: Literal["auto", "dense", "pack-quantized", "distaya"] = "auto"
    group: Group = 128
    symmetric: bool | None = None
    scale: Literal["minmax", "mse"] = "minmax"
    order: Literal["natural", "activation", "group", "block"] = "natural"
    quality: Literal["plain", "default", "high"] | None = None
    damp: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    bias_correction: bool = False
    dass: DassSpec | None = None
    permute: bool = False
    calibration: CalibrationSpec = CalibrationSpec()
    max_ram: Size | None = None
    max_vram: Size | None = None
    skip: list[_Skip] = Field(default=[])
    modules: list[Rule] = Field(default=[])
    drop_layers: Annotated[list[int] | DropSpec, BeforeValidator(read_drop)] = Field(default=[])
    heal: Annotated[HealSpec | None, BeforeValidator(read_heal)] = None
    evaluate: Annotated[EvaluateSpec | None, BeforeValidator(read_evaluate)] = None

    @model_validator(mode="before")
    @classmethod
    def _patterns(cls, fields: Any) -> Any:
        fields = one_pattern(fields)
        if isinstance(fields, dict) and is_16(fields.get("bits")):
            fields = fields | {"bits": None}
        if isinstance(fields, dict) and fields.get("method") == "dass":
            fields = fields | {"dass": fields.get("dass") or {}}
        return fields

    @model_validator(mode="after")
    def _together(self) -> Recipe:
        check_together(self)
        return self

    @property
    def effort(self) -> str:
        """The quality that is meant: plain, default or high."""
        return self.quality or ("default" if self.method in SWEEPING else "plain")

    @property
    def chained(self) -> bool:
        """Whether the run has steps beside the compression itself."""
        chosen = isinstance(self.drop_layers, DropSpec)
        return chosen or self.heal is not None or self.evaluate is not None

    def alone(self, layers: list[int]) -> Recipe:
        """What the step that compresses does, without these layers."""
        return self.model_copy(update={"drop_layers": layers, "heal": None, "evaluate": None})

    @property
    def nm_pair(self) -> tuple[int, int] | None:
        """(N, M) of the pattern, or None."""
        return None if self.nm is None else parse_nm(self.nm)

    @property
    def max_ram_bytes(self) -> int | None:
        """The memory cap in bytes, or None."""
        return None if self.max_ram is None else parse_size(self.max_ram)

    @property
    def max_vram_bytes(self) -> int | None:
        """The cap on a GPU's memory in bytes, or None."""
        return None if self.max_vram is None else parse_size(self.max_vram)

    def to_yaml(self, path: str | os.PathLike | None = None) -> str:
        """The recipe as YAML text, written to `path` as well when one is given."""
        fields = self.model_dump(mode="json")
        fields = {k: v for k, v in fields.items() if v is not None or k not in _OF_CHAINS}
        if self.heal is not None:  # a weight that nobody gave is none that somebody insists on
            given = self.heal.loss.model_dump(mode="json", exclude_unset=True)
            fields["heal"]["loss"] = given
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
