"""distill(): a student learns from a teacher; healing is the same with the model before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint, open_checkpoint
from ..device import find_device
from ..texts import check_window
from ..tokenizer import load_tokenizer
from . import pairing
from .cache import Cache, Layout, files_digest, fingerprint
from .data import Texts, TrainingData, from_texts
from .distillation import Distillation
from .events import Event, Notice
from .finetune import load_to_train
from .fit import check_packages
from .held_out import by_language
from .hidden import projector
from .loop import precision
from .parts import prepare
from .publish import Trained, check_place, train_and_publish, work_folder
from .route import choose_route
from .spec import TrainSpec
from .teacher import Cached, Online, Teacher

Tell = Callable[[Event], None]


def distill(
    teacher: str | Path,
    student: str | Path,
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
    """Train a student on a teacher's distributions and hidden states (spec.loss) and write it to
    `out` in its own format.

    teacher, student  folders or hub ids, dense, pruned or packed. A student of the same tokenizer
            is compared token by token; for another one the losses that are defined are chosen and
            said aloud in a notice (see route.choose_route)
    texts   see data.from_texts
    work    folder for checkpoints and the teacher's cache: hidden beside `out` unless named. It
            goes when `out` is written and stays when the run fails or is stopped: the same call
            then goes on from there

    training.json in `out` holds nll and kl per language on held-out text, before and after.
    InputError, UsageError or ResourceError in one sentence, as far as it can be told before either
    model is loaded; `out` is written whole or not at all.
    """
    spec, tell = spec or TrainSpec(), on_event or (lambda event: None)
    check_packages()
    pair = [open_checkpoint(each, offline=offline, packed=True) for each in (teacher, student)]
    for checkpoint in pair:
        check_place(out, checkpoint.folder, overwrite)
        check_window(spec.window, checkpoint.config)
    pairing.check_sizes(*pair)
    pairing.check_loss(spec.loss)
    tokenizers = [load_tokenizer(each.folder, each.config.vocab_size) for each in pair]
    route = choose_route(*tokenizers, spec)
    if route.sentence is not None:
        tell(Notice(route.sentence))
    spec = spec.model_copy(update={"loss": route.loss})
    where = {"device": device, "overwrite": overwrite, "work": work, "on_event": on_event}
    if route.name != "logits":
        raise NotImplementedError
    states = pairing.state_pairs(spec.loss, *pair)
    training, held_out = from_texts(
        texts, tokenizers[1], spec, vocabulary=pair[1].config.vocab_size
    )
    for note in training.notes:
        tell(Notice(note))
    about = {
        "teacher": str(teacher),
        "student": str(student),
        "states": states,
        "dropped_layers": pairing.dropped_layers(*pair),
    }
    return _by_tokens(pair, states, training, held_out, out, spec, about, **where)


def _by_tokens(
    pair: list[Checkpoint],
    states: list[tuple[int, int]],
    training: TrainingData,
    held_out: TrainingData | None,
    out: str | Path,
    spec: TrainSpec,
    about: dict[str, Any],
    *,
    device: str,
    overwrite: bool,
    work: Path | None,
    on_event: Tell | None,
) -> Trained:
    """Distil with losses that compare the same token of both."""
    tell = on_event or (lambda event: None)
    few = pairing.common_logits(*pair)
    if few is not None:
        tell(
            Notice(
                f"the teacher has {pair[0].config.vocab_size} logits and the student "
                f"{pair[1].config.vocab_size} for one vocabulary; the first {few} are compared"
            )
        )
    folder = (work or work_folder(out)) / "teacher"
    guide = _teacher(pair[0], few, training, held_out, spec, device, folder, tell)
    widths = [each.config.hidden_size for each in reversed(pair)]
    bridge = projector(*widths, spec.seed) if states else None
    model = load_to_train(pair[1], spec, device)
    place = next(model.parameters()).device
    if bridge is not None:
        bridge.to(place)
        tell(Notice(f"hidden states of {widths[0]} numbers are projected to {widths[1]}"))
    parts = prepare(model, spec)
    for note in parts.notices:
        tell(Notice(note))
    objective = Distillation(guide, spec.loss, states, bridge)
    objective.identity = f"distillation {files_digest(pair[0])} {states} {few}"

    def measured(when: str) -> dict[str, Any]:
        if held_out is None:
            return {}
        run_in = precision(spec.precision, place)
        return {when: by_language(model, guide, held_out, place, run_in)}

    before = measured("before")
    return train_and_publish(
        pair[1],
        parts,
        training,
        held_out,
        objective,
        spec,
        out,
        about=about | before,
        found=lambda: measured("after"),
        overwrite=overwrite,
        work=work,
        on_event=on_event,
    )


def _teacher(
    checkpoint: Checkpoint,
    few: int | None,
    training: TrainingData,
    held_out: TrainingData | None,
    spec: TrainSpec,
    device: str,
    folder: Path,
    tell: Tell,
) -> Teacher:
    """The teacher in memory, or its record of all rows on disk, written where it is missing."""
    k = spec.loss.cache
    if k is None:
        return Online(load_to_train(checkpoint, spec, device), few)
    parts = [training.ids] if held_out is None else [training.ids, held_out.ids]
    ids = torch.cat(parts)
    run_in = precision(spec.precision, find_device(device))
    about = fingerprint(checkpoint, f"{checkpoint.dtype}, {run_in}", ids, k)
    vocabulary = few or checkpoint.config.vocab_size
    layout = Layout(len(ids), ids.shape[1] - 1, k, vocabulary, about)
    cache = Cache(folder, layout)
    cache.prepare(spec.loss.cache_bytes)
    if missing := cache.missing():
        tell(
            Notice(
                f"the teacher's {k} most probable tokens of {len(ids)} windows are written once, "
                f"{layout.nbytes} bytes in {len(layout.shards)} shards ({len(missing)} missing)"
            )
        )
        cache.write(load_to_train(checkpoint, spec, device), ids)
    return Cached(cache)
