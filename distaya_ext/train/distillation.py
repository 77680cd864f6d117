"""The loss of a student that follows a teacher, as the training loop takes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import losses
from .head import chunked_logits, final_hidden
from .hidden import Pairs, Projector, captured
from .objective import Batch
from .spec import LossSpec
from .teacher import Said, Teacher


class Distillation:
    """sum w_i L_i / sum w_i of cross entropy, T^2 KL(teacher || student), 1 - cos and the squared
    difference of hidden states, over those of weight above 0.

    pairs      (student, teacher) numbers of the hidden states that are compared (hidden.pairs)
    projector  what makes the student's states as wide as the teacher's, or None; it learns

    Cross entropy and KL are means over the labels, hidden losses over the tokens that are not
    padding and over the pairs. Without a gradient (on held-out text) cross entropy and KL are told
    whatever their weights are. Logits of the whole vocabulary exist for a few tokens at a time, of
    the teacher as of the student, and are made again in the backward pass.
    """

    modules: nn.Module | None

    def __init__(
        self,
        teacher: Teacher,
        loss: LossSpec,
        pairs: Pairs | None = None,
        projector: Projector | None = None,
    ):
        self.teacher, self.loss = teacher, loss
        self.weights = {name: getattr(loss, name) for name in ("ce", "kl", "cosine", "mse")}
        hidden = loss.cosine + loss.mse > 0
        self.pairs = list(pairs or []) if hidden else []
        if hidden and not self.pairs:
            raise ValueError("hidden states have a weight, and no pairs of them are given")
        self.modules = projector if hidden else None

    def __call__(self, model: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Terms by name, "loss" and "count" among them; see Objective."""
        targets, counted = losses.shifted(batch.labels)
        wanted = sorted({t for _, t in self.pairs})
        said = self.teacher.say(batch, counted, wanted)
        with captured(model, sorted({s for s, _ in self.pairs})) as states:
            hidden = final_hidden(model, batch.ids)
        terms = self._logits(model, hidden[:, :-1][counted], targets[counted], said)
        terms |= self._hidden(states, said.states, batch.mask)
        terms["loss"] = losses.total(terms, self.weights)
        terms["count"] = counted.sum()
        return terms

    def _logits(
        self, model: Any, hidden: torch.Tensor, targets: torch.Tensor, said: Said
    ) -> dict[str, torch.Tensor]:
        """Cross entropy and KL of the counted positions, hidden [tokens, width]."""
        whole = not torch.is_grad_enabled()
        names = [name for name in ("ce", "kl") if whole or self.weights[name] > 0]
        if not names:
            return {}

        def sums(logits: torch.Tensor, here: slice) -> torch.Tensor:
            each = {}
            if "ce" in names:
                each["ce"] = losses.nll(logits, targets[here])
            if "kl" in names:
                each["kl"] = said.divergence(logits, here, self.loss.temperature)
            return torch.stack([each[name].sum() for name in names])

        means = chunked_logits(model, hidden, sums) / max(1, len(targets))
        return dict(zip(names, means.unbind(), strict=True))

    def _hidden(
        self,
        states: dict[int, torch.Tensor],
        wanted: dict[int, torch.Tensor],
        mask: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Cosine and squared difference, means over the pairs."""
        terms = {}
        for name, loss in (("cosine", losses.cosine), ("mse", losses.mse)):
            if self.weights[name] > 0:
                each = [loss(self._wide(states[s]), wanted[t], mask) for s, t in self.pairs]
                terms[name] = torch.stack(each).mean()
        return terms

    def _wide(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self.modules is None else self.modules(hidden)
