"""One training run from the inside: what a step learns, measures, writes down and keeps."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import InputError, UsageError
from . import saved
from .data import TrainingData
from .events import Evaluated, Event, TrainStep
from .objective import Objective
from .spec import TrainSpec

_MICRO_TOKENS = 4096  # of a micro-batch where the spec says nothing


class Diverged(Exception):
    """A loss or gradient is not finite."""


class Both(nn.Module):
    """The model and the modules of its loss, which learn together and stay where they are."""

    def __init__(self, model: nn.Module, modules: nn.Module | None):
        super().__init__()
        self.model = model
        self.modules_of_loss = modules

    def to(self, *_: Any, **__: Any) -> Both:
        return self


class Loop:
    """State of a run between its steps.

    step counts optimiser steps, tokens those seen (without padding) and seconds those spent in
    steps, all of them over interruptions. best is (step, held-out loss) of the best parameters.
    """

    def __init__(
        self,
        model: Any,
        training: TrainingData,
        held_out: TrainingData | None,
        objective: Objective,
        spec: TrainSpec,
        work: Path,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.model, self.objective = model, objective
        self.training, self.held_out = training, held_out
        self.spec, self.work = spec, work
        self.tell = on_event or (lambda event: None)
        self.whole = Both(model, objective.modules)
        self.parameters = learning(self.whole)
        self.device = next(iter(self.parameters.values())).device
        self.precision = precision(spec.precision, self.device)
        self.rows = max(1, spec.batch_tokens // training.window)  # per step
        micro = spec.micro_tokens or max(_MICRO_TOKENS, training.window)
        self.micro_rows = min(self.rows, max(1, micro // training.window))
        self.micros = math.ceil(self.rows / self.micro_rows)  # per step
        self.optimizer = adamw(self.parameters, spec)
        self.optimizer.register_step_pre_hook(self._average)
        self.scheduler = schedule(self.optimizer, spec)
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.best: tuple[int, float] | None = None
        self.losses: list[tuple[int, float]] = []  # (step, held-out loss)
        self._orders: dict[int, np.ndarray] = {}
        self._saved = -1
        self.new_step()

    # ---- a step ----

    def rows_of(self, step: int, micro: int) -> list[int]:
        """Training rows of a micro-batch: every epoch is a seeded order of all rows of its own,
        and steps take from them in turn, so a step's rows depend on nothing but its number.
        """
        start = step * self.rows + micro * self.micro_rows
        stop = min(start + self.micro_rows, (step + 1) * self.rows)
        count = len(self.training)
        return [int(self._order(at // count)[at % count]) for at in range(start, stop)]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1}
            generator = np.random.default_rng([self.spec.seed, 4, epoch])
            self._orders[epoch] = generator.permutation(len(self.training))
        return self._orders[epoch]

    def terms(self, data: TrainingData, rows: list[int]) -> tuple[dict[str, Any], float]:
        """The loss's terms on some rows, and how many labels they are means over."""
        batch = data.batch(rows, self.device)
        bfloat16 = self.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            found = self.objective(self.model, batch)
        return found, float(found["count"])

    def learn(self, rows: list[int]) -> torch.Tensor:
        """count * loss of a micro-batch. The gradients of a step are sums of these, and are
        divided by all of its labels before the optimiser sees them.
        """
        found, count = self.terms(self.training, rows)
        self._tokens += int(self.training.mask[rows].sum())
        if not count:
            return torch.zeros((), requires_grad=True)
        self._add(self._sums, found, count)
        self._count += count
        loss = float(found["loss"].detach())
        if not math.isfinite(loss):
            parts: dict[str, float] = {}
            self._add(parts, found, 1.0)
            raise Diverged(f"the loss is {loss} ({_listed(parts)}) over {count:g} labels")
        return (found["loss"] * count).to("cpu")

    @staticmethod
    def _add(sums: dict[str, float], found: Mapping[str, Any], count: float) -> None:
        for name, term in found.items():
            if name != "count":
                sums[name] = sums.get(name, 0.0) + count * float(torch.as_tensor(term).detach())

    def _average(self, *_: Any) -> None:
        """Before the optimiser's step: from sums over labels to means, checked and clipped."""
        if not self._count:
            raise InputError(f"step {self.step + 1} of the training has no label to learn from")
        held = [p for p in self.parameters.values() if p.grad is not None]
        for parameter in held:
            parameter.grad.div_(self._count)
        norm = float(nn.utils.clip_grad_norm_(held, self.spec.clip))
        if not math.isfinite(norm):
            loss = self._sums["loss"] / self._count
            raise Diverged(f"the gradient's norm is {norm} at a loss of {loss:g}")
        self._norm = norm

    def after_step(self) -> None:
        """Count, write down, measure, and keep where it is time to."""
        now = time.monotonic()
        spent = now - self._start
        self.step += 1
        self.tokens += self._tokens
        self.seconds += spent
        terms = {name: total / self._count for name, total in self._sums.items()}
        self._write(
            **terms,
            learning_rate=self._rate,
            gradient_norm=self._norm,
            tokens=self.tokens,
            seconds=round(self.seconds, 4),
            tokens_per_second=round(self._tokens / max(spent, 1e-9), 2),
        )
        self.tell(TrainStep(self.step, self.spec.steps, terms, spent))
        last = self.step == self.spec.steps
        if last or self.step % self.spec.evaluate_every == 0:
            self.evaluate()
        if last or self.step % self.spec.save_every == 0:
            self.save()
        self.new_step()

    def new_step(self) -> None:
        """Begin to count and to take the time anew."""
        self._sums: dict[str, float] = {}
        self._count = 0.0
        self._tokens = 0
        self._norm = 0.0
        self._rate = float(self.optimizer.param_groups[0]["lr"])
        self._start = time.monotonic()

    # ---- what is measured and kept ----

    def evaluate(self) -> None:
        """Loss on the held-out rows; the best parameters so far are kept. Diverged for NaN."""
        if self.held_out is None:
            return
        sums: dict[str, float] = {}
        total = 0.0
        self.whole.eval()
        with torch.no_grad():
            for start in range(0, len(self.held_out), self.micro_rows):
                rows = list(range(start, min(start + self.micro_rows, len(self.held_out))))
                found, count = self.terms(self.held_out, rows)
                if count:
                    self._add(sums, found, count)
                    total += count
        if not total:
            raise InputError(f"the {len(self.held_out)} held-out windows have no label")
        terms = {name: value / total for name, value in sums.items()}
        if not math.isfinite(terms["loss"]):
            raise Diverged(f"the held-out loss is {terms['loss']} over {total:g} labels")
        better = self.best is None or terms["loss"] < self.best[1]
        if better:
            self.best = (self.step, terms["loss"])
            saved.save_best(self.work, self.parameters, *self.best)
        self.losses.append((self.step, terms["loss"]))
        self._write(held_out=terms)
        self.tell(Evaluated(self.step, terms["loss"], better))

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        if self._saved == self.step:
            return
        state = {
            "run": self.identity,
            "scheduler": self.scheduler.state_dict(),
            "learning_rates": [group["lr"] for group in self.optimizer.param_groups],
            "threads": torch.get_num_threads(),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "best": self.best,
            "losses": self.losses,
        }
        saved.save_checkpoint(self.work, self.step, self.parameters, self.optimizer, state)
        self._saved = self.step

    def restore(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint of this run."""
        saved.restore(folder, state, self.parameters, self.optimizer)
        self.scheduler.load_state_dict(dict(state["scheduler"]))
        for group, rate in zip(self.optimizer.param_groups, state["learning_rates"], strict=True):
            group["lr"] = rate
        self.step = self._saved = state["step"]
        self.tokens = state["tokens"]
        self.seconds = state["seconds"]
        self.best = None if state["best"] is None else (state["best"][0], state["best"][1])
        self.losses = [(step, loss) for step, loss in state["losses"]]
        self.new_step()

    identity: dict[str, Any]  # what a run must share with the checkpoint it goes on from

    def _write(self, **fields: Any) -> None:
        """A line of metrics."""
        with open(self.work / saved.METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, **fields}) + "\n")


def learning(whole: nn.Module) -> dict[str, nn.Parameter]:
    """What requires a gradient, by name. UsageError for nothing, or for another type than float32.

    Names are those of the model; what the loss trains beside has "loss." before.
    """
    found: dict[str, nn.Parameter] = {}
    for name, parameter in whole.named_parameters():
        if parameter.requires_grad:
            short = name.removeprefix("model.")
            if name.startswith("modules_of_loss."):
                short = "loss." + name.removeprefix("modules_of_loss.")
            found[short] = parameter
    if not found:
        raise UsageError("nothing of the model requires a gradient, so there is nothing to train")
    for name, parameter in found.items():
        if parameter.dtype != torch.float32:
            raise UsageError(
                f"{name} is to be trained and is {str(parameter.dtype).removeprefix('torch.')}; "
                "what learns must be float32"
            )
    return found


def adamw(parameters: Mapping[str, nn.Parameter], spec: TrainSpec) -> torch.optim.AdamW:
    """AdamW whose weight decay is for matrices alone (norms, biases and scales are none)."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    others = [p for p in parameters.values() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": spec.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=spec.learning_rate)


def schedule(optimizer: torch.optim.Optimizer, spec: TrainSpec) -> Any:
    """The learning rate's course over the run: warmup, then as spec.schedule says."""
    from transformers import get_scheduler

    name = {"constant": "constant_with_warmup"}.get(spec.schedule, spec.schedule)
    warm = min(int(spec.warmup * spec.steps), spec.steps - 1)
    return get_scheduler(name, optimizer, num_warmup_steps=warm, num_training_steps=spec.steps)


def precision(wanted: str, device: torch.device) -> str:
    """float32 or bfloat16: what was asked for, or bfloat16 where the device multiplies it."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        able = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        able = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bfloat16" if able else "float32"


def _listed(terms: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in terms.items())
