"""Which layers are to go, as a recipe says it."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..errors import UsageError
from ..recipe_parts import Strict

_NUMBER = re.compile(r"[0-9]{1,6}")
_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)\s*%")

SCORES = ("kl", "ppl", "bi", "angular", "l2")


class DropSpec(Strict):
    """Layers to leave out by score: `count` of them, or a `share` of all (rounded down).

    score    kl: KL(dense || without the layer); ppl: perplexity without it; bi: block influence of
             ShortGPT; angular: the angle between what goes in and what comes out of a run of
             `count` consecutive layers, which go together; l2: the relative change
    greedy   kl and ppl are measured anew after every layer that went
    protect  layers that stay, negative ones counted from the end
    tokens   of calibration text they are measured on
    """

    count: Annotated[int, Field(ge=1)] | None = None
    share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    score: Literal["kl", "ppl", "bi", "angular", "l2"] = "kl"
    greedy: bool = True
    protect: list[int] = Field(default=[])
    tokens: Annotated[int, Field(ge=1, le=1 << 40)] = 16384

    @model_validator(mode="after")
    def _one(self) -> DropSpec:
        if (self.count is None) == (self.share is None):
            raise ValueError("say how many layers to drop: a count or a share")
        return self


def parse_drop(text: str, flag: str = "--drop-layers") -> DropSpec | list[int]:
    """Which layers go: "4" is how many, "25%" which share of all, "3,5" are indices from 0 (a
    single one is written "3,").

    flag is what the text was given to. UsageError for anything else, for none and for all of them.
    """
    text = text.strip()
    share = _PERCENT.fullmatch(text)
    if share is not None:
        part = float(share[1]) / 100
        if not 0 < part < 1:
            raise UsageError(f"{flag} {text} is a share of layers, which lies between 0% and 100%")
        return DropSpec(share=part)
    if _NUMBER.fullmatch(text):
        if not int(text):
            raise UsageError(
                f"{flag} {text} drops no layer; give at least 1 (layer {text}: {text},)"
            )
        return DropSpec(count=int(text))
    parts = [part.strip() for part in text.removesuffix(",").split(",")]
    if not all(_NUMBER.fullmatch(part) for part in parts):
        raise UsageError(
            f"{flag} {text!r} is no number of layers such as 4, no share such as 25% and no list "
            "of layer numbers such as 3,5"
        )
    return [int(part) for part in parts]
