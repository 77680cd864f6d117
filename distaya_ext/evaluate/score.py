"""Maths: logits in, surprise per token out. The only forward passes of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import InputError

_LOGIT_BYTES = 64 << 20  # float32 logits of one model held at once
_SOFTMAX_BYTES = 16 << 20  # of which this much is worked on at a time


@dataclass
class Scores:
    """Of one model on the rows of one language, float64 [rows]: sums over the scored tokens of a
    row.

    nll in nats. kl = KL(base || model) in nats and same = number of tokens with the base's first
    choice, both zero for the base itself. kl_tokens holds the KL of every token, float32 [tokens].
    """

    tokens: np.ndarray
    nll: np.ndarray
    kl: np.ndarray
    same: np.ndarray
    kl_tokens: np.ndarray


@dataclass
class Part:
    """Of one batch of rows: sums float64 [models, 3, rows] of nll, kl and same; kls float32
    [models - 1, tokens], the KL of every scored token, row after row.
    """

    sums: np.ndarray
    kls: np.ndarray


def score(
    models: Sequence[torch.nn.Module],
    rows: Sequence[torch.Tensor],
    *,
    device: str | torch.device = "cpu",
    on_tokens: Callable[[int], None] | None = None,
) -> list[Scores]:
    """Scores of each model; the first one is the base that the others are compared with.

    All models see the same batches, so a difference between two of them is a difference of weights.
    All rows are scored here, whatever other ranks do. InputError with the row number for logits
    that are not finite.
    """
    cut, parts = list(batches(rows, models[0].config.vocab_size)), []
    for batch in cut:
        parts.append(measure(models, rows, batch, device))
        if on_tokens is not None:
            on_tokens(scored(rows, batch))
    return put_together(len(models), rows, cut, parts)


@torch.inference_mode()
def measure(
    models: Sequence[torch.nn.Module],
    rows: Sequence[torch.Tensor],
    batch: Sequence[int],
    device: str | torch.device = "cpu",
) -> Part:
    """One batch (numbers of rows) through all models. InputError as of score()."""
    ids = _pad([rows[i] for i in batch]).to(device)
    logits = [model(input_ids=ids, use_cache=False).logits for model in models]
    sums = np.zeros((len(models), 3, len(batch)))
    kls: list[np.ndarray] = []
    for place, i in enumerate(batch):
        length = len(rows[i])
        found = _row([lg[place, : length - 1] for lg in logits], ids[place, 1:length])
        for which, stats in enumerate(found):
            if not np.isfinite(stats[0]).all():
                raise InputError(f"the model gives NaN or infinite logits in sample {i + 1}")
            sums[which, :, place] = stats.sum(axis=1)
        each = [stats[1] for stats in found[1:]]
        kls.append(np.array(each, dtype=np.float32).reshape(len(each), length - 1))
    return Part(sums, np.concatenate(kls, axis=1))


def put_together(
    models: int,
    rows: Sequence[torch.Tensor],
    cut: Sequence[Sequence[int]],
    parts: Sequence[Part],
) -> list[Scores]:
    """Scores of each of so many models out of the parts of all batches."""
    tokens = np.array([len(row) - 1 for row in rows], dtype=np.float64)
    found = []
    for which in range(models):
        sums = np.zeros((3, len(rows)))
        for batch, part in zip(cut, parts, strict=True):
            sums[:, batch] = part.sums[which]
        kls = [part.kls[which - 1] for part in parts if which]
        found.append(Scores(tokens, *sums, np.concatenate([np.zeros(0, np.float32), *kls])))
    return found


def scored(rows: Sequence[torch.Tensor], batch: Sequence[int]) -> int:
    """Tokens of a batch that are scored."""
    return sum(len(rows[i]) - 1 for i in batch)


def _row(logits: list[torch.Tensor], targets: torch.Tensor) -> list[np.ndarray]:
    """Per model float64 [3, tokens]: nll, kl, same. logits: [tokens, vocabulary] each."""
    parts: list[list[torch.Tensor]] = [[] for _ in logits]
    step = max(1, _SOFTMAX_BYTES // (4 * logits[0].shape[1]))
    for start in range(0, len(targets), step):
        here = slice(start, start + step)
        base = torch.log_softmax(logits[0][here].float(), dim=-1)
        first = base.argmax(dim=-1)
        for which, lg in enumerate(logits):
            log = base if which == 0 else torch.log_softmax(lg[here].float(), dim=-1)
            nll = -log.gather(1, targets[here, None])[:, 0]
            if which:
                kl = (base.exp() * (base - log)).sum(dim=-1).clamp_min_(0.0)
                same = (log.argmax(dim=-1) == first).float()
            else:
                kl = same = torch.zeros_like(nll)
            parts[which].append(torch.stack([nll, kl, same]))
    return [torch.cat(part, dim=1).double().cpu().numpy() for part in parts]


def batches(rows: Sequence[torch.Tensor], vocabulary: int) -> Iterator[list[int]]:
    """Row numbers that run together: of similar length, as many as the logits leave room for."""
    room = max(1, _LOGIT_BYTES // (4 * vocabulary))
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * len(rows[i]) > room:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _pad(rows: list[torch.Tensor]) -> torch.Tensor:
    # Padding stands on the right, where a causal model cannot see it from the tokens that count.
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
