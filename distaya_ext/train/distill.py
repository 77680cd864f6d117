"""distill(): a student learns from a teacher; healing is the same with the model before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checkpoint import open_checkpoint
from ..device import find_device
from ..errors import UsageError
from ..ranks import by_all, by_first, team
from ..texts import check_window
from ..tokenizer import check_rows, load_tokenizer
from . import pairing
from .cache import Cache, Layout, files_digest, fingerprint
from .data import Texts, TrainingData, from_texts
from .distillation import Distillation
from .events import Event, Notice
from .finetune import CrossEntropy, load_to_train
from .fit import check_packages
from .held_out import by_language
from .hidden import projector
from .loop import precision
from .objective import Objective
from .pairs import paired_data
from .parts import prepare
from .publish import Trained, check_place, train_and_publish, work_folder
from .route import choose_route
from .sequence import sequence_data
from .sharding import shard, wanted
from .spans import SpanObjective
from .spec import TrainSpec
from .teacher import Cached, Online, Teacher


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

    Under torchrun all ranks call it and share the work, see fit(); each has a whole teacher, or
    they write its record together, in a folder that all of them see.

    training.json in `out` holds nll and kl per language on held-out text, before and after.
    InputError, UsageError or ResourceError in one sentence, as far as it can be told before either
    model is loaded; `out` is written whole or not at all.
    """
    run = _Run(teacher, student, texts, spec or TrainSpec(), device, offline, on_event)
    run.folder = (work or work_folder(out)) / "teacher"
    for checkpoint in run.pair:
        check_place(out, checkpoint.folder, overwrite)
        check_window(run.spec.window, checkpoint.config)
    pairing.check_sizes(*run.pair)
    pairing.check_loss(run.spec.loss)
    wanted(run.spec)
    ready = run.ready()
    run.say(*ready.training.notes)
    model = load_to_train(run.pair[1], run.spec, device, resting=wanted(run.spec))
    parts = prepare(model, run.spec)
    run.say(*parts.notices)
    shard(model, ready.objective.modules, run.spec, run.place)

    def measured(when: str) -> dict[str, Any]:
        if ready.held_out is None:
            return {}
        found = by_language(model, ready.guide, ready.held_out, run.place, run.precision)
        return {when: found}

    about = {"teacher": str(teacher), "student": str(student), **ready.about, **measured("before")}
    return train_and_publish(
        run.pair[1],
        parts,
        ready.training,
        ready.held_out,
        ready.objective,
        run.spec,
        out,
        about=about,
        found=lambda: measured("after"),
        overwrite=overwrite,
        work=work,
        on_event=on_event,
    )


class _Ready(NamedTuple):
    """What a route makes of teacher and texts; guide: whose KL held-out text is measured by."""

    training: TrainingData
    held_out: TrainingData | None
    objective: Objective
    guide: Teacher | None
    about: dict[str, Any]


class _Run:
    """Teacher and student as they were opened, and the way from one to the other."""

    folder: Path  # of the teacher's cache

    def __init__(
        self,
        teacher: str | Path,
        student: str | Path,
        texts: Texts,
        spec: TrainSpec,
        device: str,
        offline: bool,
        on_event: Callable[[Event], None] | None,
    ):
        check_packages()
        models = (teacher, student)
        self.pair = [open_checkpoint(each, offline=offline, packed=True) for each in models]
        self.texts, self.spec, self.device = texts, spec, device
        self.tell = on_event if team().first else None
        self.place = find_device(device)
        self.precision = precision(spec.precision, self.place)

    def say(self, *sentences: str) -> None:
        for sentence in sentences:
            if self.tell is not None:
                self.tell(Notice(sentence))

    def ready(self) -> _Ready:
        """Choose the route by the tokenizers and prepare it; the spec gets the losses it has."""
        tokenizers = [load_tokenizer(each.folder, each.config.vocab_size) for each in self.pair]
        route = choose_route(*tokenizers, self.spec)
        if route.sentence is not None:
            self.say(route.sentence)
        if route.name != "logits" and self.spec.loss.cache is not None:
            raise UsageError(
                f"a cache holds the teacher's {self.spec.loss.cache} most probable tokens, and "
                "between different tokenizers tokens are not compared; leave it out"
            )
        self.spec = self.spec.model_copy(update={"loss": route.loss})
        ways = {"logits": self._tokens, "spans": self._spans, "sequence": self._sequence}
        way = ways[route.name]
        ready = way(*tokenizers)
        return ready._replace(about={"route": route.name, **ready.about})

    def _tokens(self, _: Any, tokenizer: Any) -> _Ready:
        """Every token of the student beside the same token of the teacher."""
        teacher, student = self.pair
        loss, seed = self.spec.loss, self.spec.seed
        states = pairing.state_pairs(loss, teacher, student)
        rows = student.config.vocab_size
        training, held_out = from_texts(self.texts, tokenizer, self.spec, vocabulary=rows)
        few = pairing.common_logits(teacher, student)
        if few is not None:
            self.say(
                f"the teacher has {teacher.config.vocab_size} logits and the student {rows} for "
                f"one vocabulary; the first {few} are compared"
            )
        guide = self._guide(few, training, held_out)
        widths = student.config.hidden_size, teacher.config.hidden_size
        bridge = projector(*widths, seed) if states else None
        if bridge is not None:
            bridge.to(self.place)
            self.say(f"hidden states of {widths[0]} numbers are projected to {widths[1]}")
        objective = Distillation(guide, loss, states, bridge)
        objective.identity = f"distillation {files_digest(teacher)} {states} {few}"
        about = {"states": states, "dropped_layers": pairing.dropped_layers(teacher, student)}
        return _Ready(training, held_out, objective, guide, about)

    def _spans(self, theirs: Any, ours: Any) -> _Ready:
        """Spans of bytes that two tokenizers share."""
        training, held_out, pairs = paired_data(self.texts, theirs, ours, self.spec)
        rows = self.pair[1].config.vocab_size
        for data in (training, held_out):
            if data is not None:
                check_rows(int(data.ids.max()), rows, "the texts hold token")
        model = load_to_train(self.pair[0], self.spec, self.device)
        objective = SpanObjective(model, pairs, self.spec.loss)
        return _Ready(training, held_out, objective, None, {"left_out": pairs.left_out})

    def _sequence(self, theirs: Any, ours: Any) -> _Ready:
        """Text that the teacher writes, since nothing else passes between two tokenizers."""
        model = load_to_train(self.pair[0], self.spec, self.device)
        cache = self.folder / "written.jsonl"
        tell = self.tell or (lambda event: None)
        training, held_out = sequence_data(
            model, theirs, ours, self.texts, self.spec, cache, on_event=tell
        )
        rows = self.pair[1].config.vocab_size
        for data in (training, held_out):
            if data is not None:
                check_rows(int(data.ids.max()), rows, "the teacher's text holds token")
        return _Ready(training, held_out, CrossEntropy(), None, {})

    def _guide(
        self, few: int | None, training: TrainingData, held_out: TrainingData | None
    ) -> Teacher:
        """The teacher in memory, or its record of all rows on disk, written where it is missing."""
        teacher, k = self.pair[0], self.spec.loss.cache
        if k is None:
            return Online(load_to_train(teacher, self.spec, self.device), few)
        ids = training.ids if held_out is None else torch.cat([training.ids, held_out.ids])
        about = fingerprint(teacher, f"{teacher.dtype}, {self.precision}", ids, k)
        vocabulary = few or teacher.config.vocab_size
        cache = Cache(self.folder, Layout(len(ids), ids.shape[1] - 1, k, vocabulary, about))
        by_first(lambda: cache.prepare(self.spec.loss.cache_bytes))
        if missing := by_first(cache.missing):
            self.say(
                f"the teacher's {k} most probable tokens of {len(ids)} windows are written once, "
                f"{cache.layout.nbytes} bytes in {len(cache.layout.shards)} shards "
                f"({len(missing)} missing)"
            )

            def write() -> None:
                if missing[team().rank :: team().world]:
                    # Not every rank may have some to write, so each reads for itself.
                    model = load_to_train(teacher, self.spec, self.device, together=False)
                    cache.write(model, ids, missing=missing)

            by_all(write)
        by_all(cache.check)
        return Cached(cache)
