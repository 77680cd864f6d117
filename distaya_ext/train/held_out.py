"""What a student still loses on held-out text, language by language."""

from __future__ import annotations

from typing import Any

import torch

from ..ranks import team
from . import losses
from .data import TrainingData
from .head import chunked_logits, final_hidden
from .sharding import whole_of
from .teacher import Teacher

_TOKENS = 4096  # run at once


@torch.no_grad()
def by_language(
    model: Any,
    teacher: Teacher | None,
    data: TrainingData,
    device: torch.device,
    precision: str = "float32",
) -> dict[str, dict[str, float]]:
    """Labels, nll and (with a teacher) kl = KL(teacher || model) in nats per label at temperature
    1, by language, and over all of them under "all". precision is that of the training's passes.

    Of a teacher's record (teacher.Cached) kl is the KL over the tokens it keeps and the rest. Ranks
    share the rows, and the result has the same bits with any number of them.
    """
    mode = model.training
    model.eval()
    sums: dict[str, torch.Tensor] = {}
    step = max(1, _TOKENS // data.window)
    shares = team().shares(len(data), step)
    own, whole = shares[team().rank], whole_of(model)

    def run(rows: range) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            return whole.run(lambda: _rows(model, teacher, data, rows, device))

    starts = range(own.start, own.stop, step)
    each = [run(range(start, min(start + step, own.stop))) for start in starts]
    if whole.shards:  # in step with the rank that has most
        for _ in range(max(-(-(s.stop - s.start) // step) for s in shares) - len(starts)):
            run(range(1))
    found = torch.cat([torch.zeros(0, 3, dtype=torch.float64), *each])
    found = team().collect(found, len(data), shares)
    for lang, row in zip(data.languages, found, strict=True):
        sums[lang] = sums.get(lang, torch.zeros(3, dtype=torch.float64)) + row
    model.train(mode)
    sums = {lang: sums[lang] for lang in sorted(sums)}
    sums["all"] = torch.stack(list(sums.values())).sum(dim=0)
    return {lang: _means(each, teacher is not None) for lang, each in sums.items()}


def _rows(
    model: Any, teacher: Teacher | None, data: TrainingData, rows: range, device: torch.device
) -> torch.Tensor:
    """Sums of labels, nll and kl, float64 [rows, 3]."""
    batch = data.batch(rows, device)
    targets, counted = losses.shifted(batch.labels)
    said = None if teacher is None else teacher.say(batch, counted, ())
    hidden = final_hidden(model, batch.ids)[:, :-1][counted]
    wanted = targets[counted]
    of_row = counted.nonzero()[:, 0]

    def sums(logits: torch.Tensor, here: slice) -> torch.Tensor:
        nll = losses.nll(logits, wanted[here])
        kl = torch.zeros_like(nll) if said is None else said.divergence(logits, here, 1.0)
        each = torch.stack([torch.ones_like(nll), nll, kl], dim=1).double().cpu()
        return torch.zeros(len(rows), 3, dtype=torch.float64).index_add_(
            0, of_row[here].cpu(), each
        )

    return chunked_logits(model, hidden, sums)


def _means(sums: torch.Tensor, compared: bool) -> dict[str, float]:
    labels, nll, kl = sums.tolist()
    found = {"labels": int(labels), "nll": nll / max(1.0, labels)}
    return found | ({"kl": kl / max(1.0, labels)} if compared else {})
