"""finetune(): a model, compressed or not, goes on learning from texts or chats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint, open_checkpoint
from ..device import find_device
from ..ranks import team
from ..runtime.load import load_opened
from ..texts import check_window
from ..tokenizer import load_tokenizer
from .data import IGNORED, Texts, from_texts
from .events import Event, Notice
from .fit import check_packages
from .head import chunked_logits, final_hidden
from .held_out import by_language
from .loop import precision
from .objective import Batch
from .publish import Trained, check_place, train_and_publish
from .sharding import shard, wanted
from .spec import TrainSpec


class CrossEntropy:
    """-log p(next token), the mean over the batch's labels, with the logits of a few tokens at a
    time.
    """

    modules = None
    identity = "cross entropy"

    def __call__(self, model: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Terms "loss" and "count"; see Objective."""
        hidden = final_hidden(model, batch.ids)[:, :-1]
        labels = batch.labels[:, 1:]
        learnt = labels != IGNORED
        hidden, labels = hidden[learnt], labels[learnt]

        def nll(logits: torch.Tensor, here: slice) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(logits, labels[here], reduction="sum")

        count = torch.tensor(len(labels), device=hidden.device)
        return {"loss": chunked_logits(model, hidden, nll) / count, "count": count}


def finetune(
    model: str | Path,
    out: str | Path,
    texts: Texts,
    spec: TrainSpec | None = None,
    *,
    device: str = "cpu",
    offline: bool = False,
    overwrite: bool = False,
    work: Path | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Trained:
    """Train a model on texts or chats by cross entropy and write it to `out` in its own format.

    model  a folder or hub id, dense, pruned or packed: pruned weights stay 0 and codes of packed
           ones what they are (see parts.prepare); what learns is merged into the folder
    texts  see data.from_texts
    work   folder for checkpoints: hidden beside `out` unless named. It goes when `out` is written
           and stays when the run fails or is stopped: the same call then goes on from there

    Under torchrun all ranks call it and share the work, see fit(). training.json in `out` is the
    record, with the loss per language on held-out rows before and after. InputError, UsageError or
    ResourceError in one sentence; `out` is written whole or not at all.
    """
    from .parts import prepare

    spec = spec or TrainSpec()
    tell = on_event if on_event and team().first else lambda event: None
    check_packages()
    sharded = wanted(spec)
    place = find_device(device)
    checkpoint = open_checkpoint(model, offline=offline, packed=True)
    check_place(out, checkpoint.folder, overwrite)
    check_window(spec.window, checkpoint.config)
    rows = checkpoint.config.vocab_size
    tokenizer = load_tokenizer(checkpoint.folder, rows)
    training, held_out = from_texts(texts, tokenizer, spec, vocabulary=rows)
    for note in training.notes:
        tell(Notice(note))
    network = load_to_train(checkpoint, spec, device, resting=sharded)
    parts = prepare(network, spec)
    for note in parts.notices:
        tell(Notice(note))
    shard(network, None, spec, place)
    where = next(network.parameters()).device

    def measured(when: str) -> dict[str, Any]:
        if held_out is None:
            return {}
        run_in = precision(spec.precision, where)
        return {when: by_language(network, None, held_out, where, run_in)}

    return train_and_publish(
        checkpoint,
        parts,
        training,
        held_out,
        CrossEntropy(),
        spec,
        out,
        about={"model": str(model), "loss": CrossEntropy.identity, **measured("before")},
        found=lambda: measured("after"),
        overwrite=overwrite,
        work=work,
        on_event=on_event,
    )


def load_to_train(
    checkpoint: Checkpoint,
    spec: TrainSpec,
    device: str,
    *,
    resting: bool = False,
    together: bool = True,
) -> Any:
    """The model of a folder on the device, in the dtype its passes run in: float32 where spec asks
    for float32 (auto: where the machine has no bfloat16), else its own, or bfloat16 for float16.

    Packed weights run with full-precision activations, since nothing learns from rounded ones.
    resting: it stays on the CPU, from where sharding.shard takes each rank's share to the device.
    together: all ranks call this, and read the folder once between them.
    """
    place = find_device(device, kernels=checkpoint.scheme is not None)
    dtype = checkpoint.dtype
    if precision(spec.precision, place) == "float32":
        dtype = torch.float32
    elif dtype == torch.float16:
        dtype = torch.bfloat16
    model = load_opened(checkpoint, dtype, exact=True, together=together)
    return model if resting else model.to(place)
