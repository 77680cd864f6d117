"""A tiny model, rows for it and a scripted loss, for the tests of fit()."""

import copy
import math
from dataclasses import dataclass

import torch
from tiny import FAMILIES, windows
from torch import nn
from transformers import AutoModelForCausalLM

from distaya_ext.train.data import TrainingData
from distaya_ext.train.spec import TrainSpec

SPEC = TrainSpec(
    train="full",
    steps=4,
    window=24,
    batch_tokens=96,
    evaluate_every=2,
    save_every=2,
    learning_rate=1e-2,
    precision="float32",
)


def spec(**fields) -> TrainSpec:
    return SPEC.model_copy(update=fields)


def tiny_model(family: str = "llama") -> nn.Module:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]), dtype=torch.float32)


def data(rows: int = 12, held: int = 4) -> tuple[TrainingData, TrainingData]:
    ids = windows(rows + held).ids
    return TrainingData.of_windows(ids[:rows]), TrainingData.of_windows(ids[rows:], first=rows)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@dataclass
class Scripted:
    """A loss that pulls all parameters towards `aim`, with accidents at some calls."""

    aim: float = 0.0
    nan: int | None = None
    jump: int | None = None
    calls: int = 0
    modules: nn.Module | None = None

    def __call__(self, model, batch):
        self.calls += torch.is_grad_enabled()
        total = sum(((p - self.aim) ** 2).mean() for p in model.parameters())
        if self.calls == self.nan and torch.is_grad_enabled():
            total = total * math.nan
        if self.calls == self.jump and torch.is_grad_enabled():
            total = total + next(model.parameters()).sum().mul(0).sqrt()  # a gradient of 0 * inf
        return {"loss": total, "size": total.detach() * 2, "count": torch.tensor(5)}
