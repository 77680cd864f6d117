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

from ..errors import InputError
from ..ranks import team
from . import saved
from .data import TrainingData, labelled
from .dealing import check_rows, deal
from .events import Evaluated, Event, TrainStep
from .gradients import gradients_of
from .objective import Objective
from .optimiser import adamw, learning, precision, schedule
from .sharding import whole_of
from .spec import TrainSpec
from .tally import Tally, listed, seed_all

_MICRO_TOKENS = 4096  # of a micro-batch where the spec says nothing


class Diverged(Exception):
    """A loss or gradient is not finite."""


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
        self.tell = on_event if on_event and team().first else lambda event: None
        self.told: Callable[[], int | None] = lambda: None  # the signal that this process had
        self.stop: int | None = None  # that any of them had, before the last step was taken
        self.whole = whole_of(model, objective.modules)
        self.parameters = learning(self.whole)
        self.device = next(iter(self.parameters.values())).device
        self.precision = precision(spec.precision, self.device)
        self.rows = max(1, spec.batch_tokens // training.window)  # per step
        micro = spec.micro_tokens or max(_MICRO_TOKENS, training.window)
        self.micro_rows = min(self.rows, max(1, micro // training.window))
        self.deal(max(team().world, spec.parts or 1))
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

    def deal(self, parts: int) -> None:
        """Deal a step's rows out to the ranks in so many parts."""
        check_rows(self.rows, self.training.window, parts)
        self.dealt = deal(self.rows, self.micro_rows, parts)
        self._cut = self.dealt.micros
        self.micros = len(self._cut)  # of a step, on all ranks
        self.turns = self.dealt.turns(even=self.whole.shards is not None)
        self.gradients = gradients_of(self.parameters, self.dealt, self.whole.shards)
        self._spare = labelled(self.training)[:1] if self.whole.shards else []

    # ---- a step ----

    def rows_of(self, step: int, micro: int) -> list[int]:
        """Training rows of a micro-batch: every epoch is a seeded order of all rows of its own,
        and steps take from them in turn, so a step's rows depend on nothing but its number.
        """
        count, begin = len(self.training), step * self.rows
        rows = [begin + at for at in self._cut[micro]]
        return [int(self._order(at // count)[at % count]) for at in rows]

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
            found = self.whole.run(lambda: self.objective(self.model, batch))
        return found, float(found["count"])

    def learn(self, rows: list[int], turn: int) -> torch.Tensor:
        """count * loss of a micro-batch, the turn-th of this rank in the step; no rows: it has
        none left. The gradients of a step are sums of these, and are divided by all of its labels
        before the optimiser sees them.
        """
        if turn == 0:
            self.gradients.begin()
        if (place := self.turns[turn]) is None:
            return self._idle()
        part, micro = place
        if self.dealt.parts.count > 1:
            seed_all(self.spec.seed, self.step, micro)
        tally = self._tallies.setdefault(part, Tally())
        tally.tokens += int(self.training.mask[rows].sum())
        if self.whole.shards and not labelled(self.training, rows):
            return self._idle()
        found, count = self.terms(self.training, rows)
        if not count:
            return torch.zeros((), requires_grad=True)
        tally.add(found, count)
        loss = float(found["loss"].detach())
        if not math.isfinite(loss) and self._bad is None:
            self._bad = f"the loss is {loss} ({listed(found)}) over {count:g} labels"
            if team().alone:
                raise Diverged(self._bad)
        return (found["loss"] * count).to("cpu")

    def passed_back(self, turn: int) -> None:
        """The backward pass of this rank's turn-th micro-batch is done."""
        place, after = self.turns[turn], self.turns[turn + 1 : turn + 2]
        if place is not None and (not after or after[0] is None or after[0][0] != place[0]):
            self.gradients.close()

    def _idle(self) -> torch.Tensor:
        """A loss that counts 0, in step with the ranks that have something left to learn from."""
        if not self.whole.shards:
            return torch.zeros((), requires_grad=True)
        found, _ = self.terms(self.training, self._spare)
        return (found["loss"] * 0.0).to("cpu")

    def _average(self, *_: Any) -> None:
        """Before the optimiser's step: from sums over labels to means, checked and clipped, alike
        on all ranks.
        """
        own = [[part, *tally.plain()] for part, tally in self._tallies.items()]
        told = team().gather([own, self._bad, self.told()])
        self.stop = next((signal for _, _, signal in told if signal is not None), None)
        if bad := next((bad for _, bad, _ in told if bad is not None), None):
            raise Diverged(bad)
        self._tally = Tally()
        for _, *plain in sorted(each for of_rank, _, _ in told for each in of_rank):
            self._tally.join(*plain)
        count = self._tally.count
        if not count:
            raise InputError(f"step {self.step + 1} of the training has no label to learn from")
        self.gradients.finish()
        norm = self.gradients.average(count, self.spec.clip)
        if not math.isfinite(norm):
            loss = self._tally.sums["loss"] / count
            raise Diverged(f"the gradient's norm is {norm} at a loss of {loss:g}")
        self._norm = norm

    def after_step(self) -> None:
        """Count, write down, measure, and keep where it is time to."""
        now = time.monotonic()
        spent = now - self._start
        tokens = self._tally.tokens
        self.step += 1
        self.tokens += tokens
        self.seconds += spent
        terms = self._tally.means()
        if self.dealt.parts.count > 1:
            seed_all(self.spec.seed, self.step, 0)  # for the checkpoint: whatever this rank drew
        self._write(
            **terms,
            learning_rate=self._rate,
            gradient_norm=self._norm,
            tokens=self.tokens,
            seconds=round(self.seconds, 4),
            tokens_per_second=round(tokens / max(spent, 1e-9), 2),
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
        self._tallies: dict[int, Tally] = {}  # of this rank's parts
        self._tally = Tally()
        self._bad: str | None = None
        self._norm = 0.0
        self._rate = float(self.optimizer.param_groups[0]["lr"])
        self._start = time.monotonic()

    # ---- what is measured and kept ----

    def evaluate(self) -> None:
        """Loss on the held-out rows; the best parameters so far are kept. Diverged for NaN."""
        if self.held_out is None:
            return
        tally = self._looked(self.held_out)
        if not tally.count:
            raise InputError(f"the {len(self.held_out)} held-out windows have no label")
        terms, total = tally.means(), tally.count
        if not math.isfinite(terms["loss"]):
            raise Diverged(f"the held-out loss is {terms['loss']} over {total:g} labels")
        better = self.best is None or terms["loss"] < self.best[1]
        if better:
            self.best = (self.step, terms["loss"])
            saved.save_best(self.work, self.parameters, *self.best)
        self.losses.append((self.step, terms["loss"]))
        self._write(held_out=terms)
        self.tell(Evaluated(self.step, terms["loss"], better))

    def _looked(self, held_out: TrainingData) -> Tally:
        """The sums over the held-out rows, in batches that are dealt out to the ranks."""
        starts = range(0, len(held_out), self.micro_rows)
        shares = team().shares(len(starts))
        own = starts[shares[team().rank]]
        found = []
        self.whole.eval()
        with torch.no_grad():
            for start in own:
                rows = list(range(start, min(start + self.micro_rows, len(held_out))))
                one = Tally()
                one.add(*self.terms(held_out, rows))
                found.append(one.plain())
            if self.whole.shards:
                for _ in range(max(s.stop - s.start for s in shares) - len(own)):
                    self.terms(self.training, self._spare)
        tally = Tally()
        for plain in (each for of_rank in team().gather(found) for each in of_rank):
            if plain[1]:
                tally.join(*plain)
        return tally

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        if self._saved == self.step:
            return
        state = {
            "run": self.identity,
            "scheduler": self.scheduler.state_dict(),
            "learning_rates": [group["lr"] for group in self.optimizer.param_groups],
            "threads": torch.get_num_threads(),
            "parts": self.dealt.parts.count,
            "sharded": self.whole.shards is not None,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "best": self.best,
            "losses": self.losses,
        }
        saved.save_checkpoint(self.work, self.step, self.parameters, self.optimizer, state)
        self._saved = self.step

    def restore(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint of this run."""
        parts = max(team().world, self.spec.parts or state.get("parts", 1))
        if parts != self.dealt.parts.count:
            self.gradients.leave()
            self.deal(parts)
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
        if not team().first:
            return
        with open(self.work / saved.METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, **fields}) + "\n")
