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


@torch.inference_mode()
def score(
    models: Sequence[torch.nn.Module],
    rows: Sequence[torch.Tensor],
    *,
    device: str | torch.device = "cpu",
    on_tokens: Callable[[int], None] | None = None,
) -> list[Scores]:
    """Scores of each model; the first one is the base that the others are compared with.

    All models see the same batches, so a difference between two of them is a difference of weights.
    InputError with the row number for logits that are not finite.
    """
    tokens = np.array([len(row) - 1 for row in rows], dtype=np.float64)
    sums = [np.zeros((3, len(rows))) for _ in models]
    kls: list[list[np.ndarray]] = [[] for _ in models]
    vocabulary = models[0].config.vocab_size
    for batch in _batches(rows, vocabulary):
        ids = _pad([rows[i] for i in batch]).to(device)
        logits = [model(input_ids=ids, use_cache=False).logits for model in models]
        for place, i in enumerate(batch):
            length = len(rows[i])
            targets = ids[place, 1:length]
            for which, stats in enumerate(
                _row([lg[place, : length - 1] for lg in logits], targets)
            ):
                if not np.isfinite(stats[0]).all():
                    raise InputError(f"the model gives NaN or infinite logits in sample {i + 1}")
                sums[which][:, i] = stats.sum(axis=1)
                if which:
                    kls[which].append(stats[1].astype(np.float32))
        if on_tokens is not None:
            on_tokens(int(sum(tokens[i] for i in batch)))
    return [
        Scores(tokens, *part, np.concatenate(kl) if kl else np.zeros(0, np.float32))
        for part, kl in zip(sums, kls, strict=True)
    ]


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


def _batches(rows: Sequence[torch.Tensor], vocabulary: int) -> Iterator[list[int]]:
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
