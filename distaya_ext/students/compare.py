"""students(): reads, makes and scores candidates, one model in memory at a time."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, open_checkpoint
from ..compress.budget import physical_bytes
from ..device import find_device
from ..errors import DistayaError, UsageError
from ..evaluate.load import load
from ..texts import read_texts
from ..tokenizer import load_tokenizer
from .choose import recommend
from .facts import count, count_text, facts, parse_budget
from .fertility import fertility
from .loss import Loss, Sample, sample, zero_step
from .make import make_student
from .rows import Row, Table
from .shape import skeleton
from .shapes import derive, smallest

LINES = 16  # times the characters scored are tokenised
_WINDOW = 128  # tokens, of the texts that shapes are cut by
_ENOUGH = 8 * _WINDOW  # characters of a language that make a window with any tokenizer in use
OnStep = Callable[[int, int, str], None]


def students(
    models: Sequence[str | Path],
    texts: str | Path | Mapping[str, Sequence[str]],
    budget: str | int | float,
    *,
    teacher: str | Path | None = None,
    languages: Sequence[str] | None = None,
    shapes: bool = True,
    characters: int = 4096,
    seed: int = 0,
    device: str = "cpu",
    offline: bool = False,
    on_step: OnStep | None = None,
) -> Table:
    """Compare candidate students and recommend one.

    models      local folders or hub ids; one that cannot be read gets its reason in its row
    texts       folder of <lang>.txt, .jsonl or .parquet, or documents per language
    budget      parameters of all kinds together: 1.5B, 500M, 8e8
    teacher     with it, shapes derived from it that fit are candidates too (shapes=False: not);
                they are made in a scratch folder, with its weights, and scored; layers that stay
                are spread evenly (shrink can choose them by what is lost without them)
    languages   of the texts that count; None: all
    characters  per language that are scored; 16 times as many are tokenised

    Only what fits, and is smaller than the teacher, is scored, one model in memory at a time.
    InputError when nothing fits, UsageError for a budget or languages that make no sense.
    """
    most = parse_budget(budget)
    if not models and teacher is None:
        raise UsageError("there is no candidate; name some, or a teacher to derive shapes from")
    names = [str(model) for model in models]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"the candidate {twice[0]} is named twice")
    if characters < 1:
        raise UsageError(f"{characters} characters cannot be scored; 1 is the least")
    find_device(device)
    found = sample(_documents(texts, languages), characters, LINES * characters)
    run = _Run(found, most, seed, device, offline, on_step)
    rows = [run.read(name) for name in names]
    guide = None
    if teacher is not None:
        guide = run.teach(str(teacher), rows)
        if shapes:
            rows += run.derived(guide)
    if not rows:
        run.without_candidates(guide)
    run.judge(rows, guide)
    if not any(row.fits for row in rows):
        recommend(rows, most, run.least)  # says what is wrong
    run.score(rows, guide)
    return Table(most, guide, rows, recommend(rows, most), list(found.pieces), run.notes)


def _documents(
    texts: str | Path | Mapping[str, Sequence[str]], languages: Sequence[str] | None
) -> dict[str, list[str]]:
    read = texts if isinstance(texts, Mapping) else read_texts(texts)
    if languages is None:
        return {lang: list(documents) for lang, documents in read.items()}
    if absent := [lang for lang in languages if lang not in read]:
        raise UsageError(
            f"there is no text in {', '.join(absent)}; the texts are in {', '.join(sorted(read))}"
        )
    return {lang: list(read[lang]) for lang in dict.fromkeys(languages)}


class _Run:
    """One comparison on its way."""

    def __init__(
        self,
        found: Sample,
        budget: int,
        seed: int,
        device: str,
        offline: bool,
        on_step: OnStep | None,
    ):
        self.sample, self.budget, self.seed = found, budget, seed
        self.device, self.offline, self.on_step = device, offline, on_step
        self.notes: list[str] = []
        self.least: int | None = None  # parameters of the smallest shape tried
        self._teacher: Checkpoint | None = None

    def read(self, name: str) -> Row:
        """Facts and fertility of a model that is there."""
        row = Row(name)
        try:
            checkpoint = open_checkpoint(name, offline=self.offline, packed=True)
            row.facts = facts(checkpoint)
            tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config.vocab_size)
            row.tokenized = fertility(tokenizer, self.sample.lines)
        except (DistayaError, OSError) as error:
            row.error = _sentence(error)
        return row

    def teach(self, name: str, rows: list[Row]) -> Row:
        """The teacher's own row; what it cannot do is an error of the whole comparison."""
        self._teacher = checkpoint = open_checkpoint(name, offline=self.offline)
        tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config.vocab_size)
        found = fertility(tokenizer, self.sample.lines)
        row = Row(name, facts=facts(checkpoint), tokenized=found, compute=1.0)
        for other in rows:
            if other.tokenized is not None and other.facts is not None:
                same = other.facts.vocabulary == row.facts.vocabulary
                other.same_tokenizer = same and other.tokenized.digest == found.digest
        return row

    def derived(self, teacher: Row) -> list[Row]:
        """A row for every shape cut out of the teacher that fits."""
        checkpoint, rows = self._teacher, []
        for cut, shape in derive(checkpoint, self.budget).items():
            sizes = count(
                skeleton(checkpoint, shape), checkpoint.architecture, folder=checkpoint.folder
            )
            row = Row(f"teacher cut by {cut}", shape, cut, sizes, teacher.tokenized, True)
            rows.append(row)
        if teacher.facts.parameters > self.budget:
            self.least = smallest(checkpoint)
        else:
            self.notes.append(
                f"the teacher itself, {count_text(teacher.facts.parameters)} parameters, is within "
                "the budget, so no shape is derived from it"
            )
        return rows

    def without_candidates(self, teacher: Row) -> None:
        """Refuse a comparison of nothing."""
        if self.least is not None:
            recommend([], self.budget, self.least)
        raise UsageError(
            f"there is no candidate: the teacher has {teacher.facts.parameters:,} parameters and "
            f"the budget is {self.budget:,}; name some, or a smaller budget"
        )

    def judge(self, rows: list[Row], teacher: Row | None) -> None:
        """What fits, and what it costs beside the teacher."""
        for row in rows:
            if row.facts is None or row.error is not None:
                continue
            row.fits = row.facts.parameters <= self.budget
            if teacher is not None:
                row.compute = row.flop_per_byte / teacher.flop_per_byte
                if row.facts.parameters >= teacher.facts.parameters:
                    row.fits = False
                    self.notes.append(
                        f"{row.name} has {row.facts.parameters:,} parameters and the teacher "
                        f"{teacher.facts.parameters:,}; a student has fewer"
                    )

    def score(self, rows: list[Row], teacher: Row | None) -> None:
        """Bits per byte of what fits, and of the teacher where the memory holds it twice."""
        every = [row for row in rows if row.fits]
        if teacher is not None:
            if 2 * teacher.facts.weight_bytes <= physical_bytes():
                every.append(teacher)
            else:
                self.notes.append("the teacher is too large for this memory to be scored whole")
        for done, row in enumerate(every):
            self._step(done, len(every), row.name)
            try:
                row.loss = self._made(row) if row.shape is not None else self._loss(row.name)
            except (DistayaError, OSError) as error:
                row.error = _sentence(error)
            gc.collect()  # one model at a time
        self._step(len(every), len(every), "")

    def _loss(self, folder: str) -> Loss:
        loaded = load(folder, device=self.device, offline=self.offline)
        return zero_step(loaded, self.sample.pieces, device=self.device)

    def _made(self, row: Row) -> Loss:
        """Make the student of a derived shape, score it, and throw it away."""
        texts: Any = self.sample.rest
        if min(sum(map(len, rest)) for rest in texts.values()) < _ENOUGH:
            texts = self.sample.lines
            note = "the texts are few, so shapes are scored on lines that their cut has seen"
            if note not in self.notes:
                self.notes.append(note)
        shape, config = row.shape, self._teacher.config
        with tempfile.TemporaryDirectory(prefix="distaya-students-") as scratch:
            out = Path(scratch) / "student"
            make_student(
                self._teacher.folder,
                out,
                layers=shape.layers,
                hidden=shape.hidden,
                intermediate=shape.intermediate,
                heads=shape.heads,
                texts=texts,
                window=min(_WINDOW, getattr(config, "max_position_embeddings", _WINDOW)),
                seed=self.seed,
                device=self.device,
            )
            try:
                return self._loss(str(out))
            except DistayaError as error:
                raise type(error)(str(error).replace(str(out), row.name)) from error

    def _step(self, done: int, total: int, name: str) -> None:
        if self.on_step is not None:
            self.on_step(done, total, name)


def _sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(error).__name__
