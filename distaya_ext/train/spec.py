"""What a training run is: everything that decides its result, in checked records."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ..recipe_parts import Strict, regular
from ..weighting import Quotas

Share = Annotated[float, Field(ge=0.0)]


class LossSpec(Strict):
    """Weights of the terms of the loss, sum_i w_i L_i / sum_i w_i; a weight of 0 leaves one out.

    ce        cross entropy with the next token of the text
    kl        T^2 KL(teacher || student) of the next-token distributions at `temperature` T
    cosine    1 - cos of hidden states, mse their squared difference per channel
    layers    hidden states that are compared: "last", "all" (spread evenly over the shallower
              model) or pairs (student, teacher) of hidden states; 0 is the embedding's output and
              n the output of layer n - 1
    cache     None: the teacher runs beside the student; k: its k most probable tokens of every
              position are written once, and read in every epoch
    cache_bytes  how large that cache may become on disk
    spans     weight of the probabilities of byte-aligned spans, where tokenizers differ
    """

    ce: Share = 0.0
    kl: Share = 1.0
    temperature: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    cosine: Share = 0.0
    mse: Share = 0.0
    layers: Literal["last", "all"] | list[tuple[int, int]] = "all"
    cache: Annotated[int, Field(ge=1)] | None = None
    cache_bytes: Annotated[int, Field(ge=1)] | None = None
    spans: Share = 0.0

    @model_validator(mode="after")
    def _something(self) -> LossSpec:
        if not self.ce + self.kl + self.cosine + self.mse + self.spans:
            raise ValueError("every weight of the loss is 0, so there is nothing to learn")
        return self


class TrainSpec(Strict):
    """How a model is trained, and on what.

    train     what learns: "lora" low-rank updates beside every Linear of the decoder layers (or
              those that `targets`, regular expressions searched in module names, find); "full"
              every weight that is stored dense, pruned ones staying zero; "scales" the scales of
              quantised weights, never their codes
    also      what learns beside: norms, embeddings (and the head tied to them), scales
    rank, alpha   of LoRA: W + alpha / rank B A; alpha None is the rank
    steps     optimiser steps of batch_tokens tokens each, gathered in micro-batches of micro_tokens
              (None: up to 4096); a step's loss is the mean over all its labels either way
    warmup    share of the steps in which the learning rate rises to learning_rate, which falls by
              `schedule` after that; clip: largest norm of the gradient
    held_out  share of every language's windows that is not trained on and decides, every
              evaluate_every steps, which parameters are kept (0: the last ones are)
    save_every  steps between checkpoints, from which a stopped run goes on
    path, tokens, quotas  texts, how many tokens of them (None: all there are), and of a language
    shard     under torchrun: "full" has every rank hold a share of what learns, of its gradient and
              its moments (FSDP), for students too large for one device; "none": every rank has all
    parts     into how many parts a step's rows are cut, which are summed one by one and then
              together (None: one for each rank that the run begins with); the same number gives the
              same bits with any number of ranks up to it
    precision of the forward and backward passes: auto is bfloat16 where the machine multiplies it
              in hardware; what learns is always float32
    """

    train: Literal["lora", "full", "scales"] = "lora"
    also: list[Literal["norms", "embeddings", "scales"]] = Field(default=[])
    targets: list[str] = Field(default=[])
    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0.0)] | None = None
    steps: Annotated[int, Field(ge=1)] = 500
    batch_tokens: Annotated[int, Field(ge=2)] = 2048
    micro_tokens: Annotated[int, Field(ge=2)] | None = None
    window: Annotated[int, Field(ge=2, le=1 << 20)] = 256
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-3
    warmup: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    clip: Annotated[float, Field(gt=0.0)] = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    shard: Literal["none", "full"] = "none"
    parts: Annotated[int, Field(ge=1)] | None = None
    evaluate_every: Annotated[int, Field(ge=1)] = 100
    save_every: Annotated[int, Field(ge=1)] = 100
    held_out: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    path: str | None = None
    tokens: Annotated[int, Field(ge=1, le=1 << 40)] | None = None
    quotas: Quotas = None
    loss: LossSpec = LossSpec()

    @field_validator("targets")
    @classmethod
    def _targets(cls, value: list[str]) -> list[str]:
        return [regular(pattern, "target pattern") for pattern in value]

    @model_validator(mode="after")
    def _fits(self) -> TrainSpec:
        if self.batch_tokens < self.window:
            raise ValueError(
                f"a batch of {self.batch_tokens} tokens is less than one window of {self.window}"
            )
        return self
