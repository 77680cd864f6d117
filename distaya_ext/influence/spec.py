"""Which layers are to go, as a recipe says it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..recipe_parts import Strict

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
