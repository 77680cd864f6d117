"""What a recipe says beside the compression itself: layers by score, healing, evaluation.

    drop_layers: 25%          # or 4, a list of indices, or a mapping, see influence.spec.DropSpec
    heal: {steps: 500}        # or 500, see train.spec.TrainSpec
    evaluate: {path: texts/}  # or the folder alone

The order is fixed: drop, compress, heal, evaluate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from .errors import UsageError
from .evaluate.continuations import CONTINUATIONS, NEW_TOKENS
from .evaluate.gate import check_limits, check_possible
from .influence.spec import DropSpec, parse_drop
from .recipe_fields import PACKED_BITS
from .recipe_parts import Strict
from .train.healing import HEALING
from .train.spec import TrainSpec

if TYPE_CHECKING:
    from .recipe import Recipe

_TERMS = {"ce", "kl", "cosine", "mse", "spans"}  # weights of a loss
_INDICES = TypeAdapter(list[Annotated[int, Field(ge=0)]])


class HealSpec(TrainSpec):
    """Training that makes up for what leaving out layers, pruning and rounding lost.

    teacher is what the compressed model learns from, a local folder or hub id; None is the recipe's
    own model as it was before. path None is the folder of the calibration texts. Defaults are those
    of train.healing, as for `distaya heal`.
    """

    teacher: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        loss = fields.get("loss")
        if isinstance(loss, dict) and not _TERMS & loss.keys():
            usual = dict(HEALING["loss"])
            if loss.get("cache") is not None:
                del usual["cosine"]  # a cache has no hidden states
            fields = fields | {"loss": usual | loss}
        return {**HEALING, **fields}


class EvaluateSpec(Strict):
    """How the result is measured against the model before, per language.

    path, tokens, window, per_line, continuations and new_tokens are those of evaluate(). With
    gate: {max_worst_ppl_ratio: 1.15} the run ends in GateError (exit code 6) when a limit is
    broken, see evaluate.gate.GATES; the result is kept.
    """

    path: Annotated[str, Field(min_length=1)]
    tokens: Annotated[int, Field(ge=1, le=1 << 40)] | None = None
    window: Annotated[int, Field(ge=2, le=1 << 20)] = 256
    per_line: bool = False
    continuations: Annotated[int, Field(ge=0, le=4096)] = CONTINUATIONS
    new_tokens: Annotated[int, Field(ge=1, le=4096)] = NEW_TOKENS
    gate: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _windows(self) -> EvaluateSpec:
        if self.per_line and self.tokens is not None:
            raise ValueError(
                f"tokens ({self.tokens}) cuts windows and has no meaning with per_line"
            )
        try:
            check_limits(self.gate)
            check_possible(self.gate, base=True, continuations=self.continuations > 0)
        except UsageError as error:
            raise ValueError(str(error)) from None
        return self


def read_drop(value: Any) -> Any:
    """drop_layers as a recipe may say it, as a sorted list of indices or a DropSpec."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str):
        value = parse_drop(value, "drop_layers")
    if isinstance(value, Mapping):
        try:
            return DropSpec(**value)
        except UsageError as error:
            raise ValueError(f"drop_layers: {error}") from None
    if isinstance(value, DropSpec):
        return value
    try:
        layers = _INDICES.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(["drop_layers", *map(str, first["loc"])])
        reason = first["msg"][0].lower() + first["msg"][1:]
        raise ValueError(f"{where} {repr(first['input'])[:80]} is not usable: {reason}") from None
    for index in layers:
        if layers.count(index) > 1:
            raise ValueError(f"drop_layers names layer {index} twice")
    return sorted(layers)


def read_heal(value: Any) -> Any:
    """heal: 500 means that many steps and defaults."""
    number = isinstance(value, int) and not isinstance(value, bool)
    return {"steps": value} if number else value


def read_evaluate(value: Any) -> Any:
    """evaluate: texts/ means that folder and defaults."""
    return {"path": value} if isinstance(value, str) else value


def check_chain(recipe: Recipe) -> None:
    """ValueError, in one sentence, for healing that has nothing to do or would undo the rest."""
    heal = recipe.heal
    if heal is None:
        return
    every = (recipe.bits, recipe.embed_bits, *(rule.bits for rule in recipe.modules))
    bits = {n for n in every if n is not None}
    changes = recipe.method != "dense" or recipe.drop_layers or bits
    if not changes and heal.teacher is None:
        raise ValueError(
            "heal makes up for what compression lost, and this recipe changes nothing: prune, "
            "quantise or leave out layers, or name another teacher"
        )
    if (heal.train == "scales" or "scales" in heal.also) and not bits:
        raise ValueError("heal trains scales, and this recipe quantises nothing: say to how many")
    loose = bits if recipe.format == "dense" else bits - set(PACKED_BITS)
    if loose:
        said = ", ".join(map(str, sorted(loose)))
        raise ValueError(
            f"heal would move weights of {said} bits off their grid, since they are written as "
            f"ordinary floats: heal needs {', '.join(map(str, PACKED_BITS))} bits in format auto, "
            "pack-quantized or distaya"
        )
