"""What recipes are made of: strict records with one-sentence errors, rules for single modules."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_serializer,
    model_validator,
)

from .errors import UsageError
from .recipe_fields import Bits, Group, Nm, Share, is_16, one_pattern, parse_nm, regular
from .weighting import Quotas, Weights

_RECORDS = ("calibration", "dass", "heal", "evaluate", "loss")  # fields that are records again

_BY_LANGUAGE = ("weights", "quotas")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def __init__(self, /, **fields: Any):
        _check_keys(fields)
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise UsageError(_sentence(type(self), error)) from None


def _check_keys(value: Any, where: str = "") -> None:
    """UsageError for a key that is no text (YAML reads yes, 1 and ~ as none); pydantic falls over
    them. Languages have a sentence of their own for that, see weighting.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise UsageError(
                    f"{where or 'the recipe'} has the key {str(key)[:80]}, which is no text"
                )
            if key not in _BY_LANGUAGE:
                _check_keys(inner, f"{where}.{key}".strip("."))
    elif isinstance(value, (list, tuple)):
        for at, inner in enumerate(value):
            _check_keys(inner, f"{where}[{at}]")


class Rule(Strict):
    """What modules get instead of the recipe's own pattern, all of it.

    match is a regular expression searched in full module names of the source model. sparsity or nm
    with or without bits, or bits alone, as in Recipe; group None is the recipe's. What a rule
    leaves out is not done: bits=4 in a recipe that prunes means quantised and not pruned. bits 16
    are the model's own floats, so bits=16 alone, like dense=True, leaves the modules as they are.

    A module with sparsity or nm is swept as by sparsegpt, one with bits alone as by gptq.
    """

    match: Annotated[str, AfterValidator(lambda value: regular(value, "match"))]
    sparsity: Share | None = None
    nm: Nm | None = None
    bits: Bits | None = None
    group: Group | None = None
    dense: bool = False

    @model_validator(mode="before")
    @classmethod
    def _patterns(cls, fields: Any) -> Any:
        fields = one_pattern(fields)
        if isinstance(fields, dict) and is_16(fields.get("bits")):
            alone = fields.get("sparsity") is None and fields.get("nm") is None
            fields = fields | {"bits": None} | ({"dense": True} if alone else {})
        return fields

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
    dense_neurons: Share = 0.0
    permute: bool = False

    @model_validator(mode="after")
    def _contiguous(self) -> DassSpec:
        if self.dense_neurons and not self.permute:
            raise ValueError(
                f"dense_neurons ({self.dense_neurons:g}) stand together at the end of the MLP, so "
                "they need permute: true"
            )
        return self


class CalibrationSpec(Strict):
    """What the calibration statistics are gathered from.

    tokens is the total over all languages, window the tokens per sample (both counted with BOS).
    quotas gives languages tokens of their own (0: leaves one out); the others share what is left.

    weights says how much each language counts in H = sum_l w_l H_l: "proportional" every token as
    much as any other; "equal" every language as much as any other, however many tokens it has;
    {lang: weight} a token of that language as much as `weight` tokens of a language not named;
    "worst" begins like equal and raises, layer after layer, the languages that lose most.

    parts: in how many parts of neighbouring windows the statistics are summed before the parts are
    added (None: one for each process of the run). The same number gives the same bits, whatever the
    number of processes.
    """

    path: str | None = None
    tokens: Annotated[int, Field(ge=1, le=1 << 40)] = 65536
    window: Annotated[int, Field(ge=2, le=1 << 20)] = 256
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    weights: Weights = "proportional"
    quotas: Quotas = None
    parts: Annotated[int, Field(ge=1, le=1 << 16)] | None = None

    @model_validator(mode="after")
    def _one_window(self) -> CalibrationSpec:
        if self.tokens < self.window:
            raise ValueError(f"{self.tokens} tokens are fewer than one window of {self.window}")
        return self


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
        return f"{'the recipe' if 'model' in model.model_fields else 'it'} lacks {name!r}"
    if first["type"] == "value_error":  # our own sentences
        inner = str(first["ctx"]["error"])
        nested = name in _RECORDS or name.startswith("rule ")
        return f"{name}: {inner}" if nested else inner
    reason = first["msg"][0].lower() + first["msg"][1:]
    return f"{name} {repr(first['input'])[:80]} is not usable: {reason}"
