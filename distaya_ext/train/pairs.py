"""Rows of text for a student and its teacher at once: the same bytes in both tokenizers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..documents import open_texts
from ..errors import InputError, UsageError
from ..texts import planned
from ..tokenizer import separator
from .align import Aligned, Vocabulary, align
from .chat import chat_files
from .data import IGNORED, Texts, TrainingData, _rng, _split
from .spec import TrainSpec


@dataclass(frozen=True)
class Pairs:
    """Of every row, training rows first: the teacher's tokens and the spans.

    teacher  ids int64 [L_T] of each row
    spans    int64 [n, 4] of each row: the teacher's tokens [a, b) and the student's [c, d) stand
             for the same bytes; none begins with the first token, which nothing predicts
    first    int64 [teacher's ids]: see first_tokens
    left_out documents whose bytes the tokenizers read differently, by language
    """

    teacher: list[torch.Tensor]
    spans: list[torch.Tensor]
    first: torch.Tensor
    left_out: dict[str, int] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 of everything, the first 16 hexadecimal digits."""
        found = hashlib.sha256()
        for part in (*self.teacher, *self.spans, self.first):
            found.update(repr(list(part.shape)).encode())
            found.update(part.contiguous().numpy())
        return found.hexdigest()[:16]


@dataclass
class _Row:
    teacher: list[int]
    student: list[int]
    spans: list[tuple[int, int, int, int]]


def paired_data(
    texts: Texts, teacher_tokenizer: Any, student_tokenizer: Any, spec: TrainSpec
) -> tuple[TrainingData, TrainingData | None, Pairs]:
    """(training, held-out, pairs) of documents cut where both tokenizers have a boundary.

    texts, spec  as in data.from_texts, but text alone: chats are refused. A row has at most
                 spec.window tokens of the student and as many of the teacher's as stand for the
                 same bytes; it starts with BOS where a tokenizer has one, and documents in one row
                 have each tokenizer's separator between them.

    Documents that the two read as different bytes are left out, which notes tell. InputError where
    nothing is left.
    """
    if chat_files(texts):
        raise UsageError(
            "chats are written by each tokenizer's own template, so spans of bytes cannot be "
            "aligned in them; give plain text"
        )
    documents: Mapping[str, Iterable[str]] = (
        texts if isinstance(texts, Mapping) else open_texts(texts)
    )
    sides = Vocabulary(teacher_tokenizer), Vocabulary(student_tokenizer)
    wanted = planned(list(documents), spec.tokens, spec.window, spec.quotas)
    rows: list[_Row] = []
    languages: list[str] = []
    left_out: dict[str, int] = {}
    for lang in documents:
        if wanted[lang] == 0:
            continue
        found, lost = _rows(list(documents[lang]), lang, wanted[lang], *sides, spec)
        rows += found
        languages += [lang] * len(found)
        left_out |= {lang: lost} if lost else {}
    if not rows:
        raise InputError(
            f"no text is left: the two tokenizers read all {sum(left_out.values())} documents as "
            "different bytes"
        )
    return _divided(rows, languages, first_tokens(*sides), left_out, spec)


def first_tokens(teacher: Vocabulary, student: Vocabulary) -> torch.Tensor:
    """int64 [teacher's ids]: the token with which the student begins to write the bytes of each
    token of the teacher's, by its own merges; -1 for marks and what it cannot write.

    Where both have a token of the same bytes it is that token.
    """
    same = {string: i for i, string in enumerate(student.strings) if string}
    marks = set(teacher.tokenizer.all_special_ids)
    found = torch.full((len(teacher.strings),), -1, dtype=torch.int64)
    for i, string in enumerate(teacher.strings):
        if not string or i in marks:
            continue
        at = same.get(string)
        if at is None:
            ids = student.write(string)
            at = ids[0] if ids else -1
        found[i] = at
    return found


def _rows(
    documents: list[str],
    lang: str,
    wanted: int | None,
    teacher: Vocabulary,
    student: Vocabulary,
    spec: TrainSpec,
) -> tuple[list[_Row], int]:
    """Rows of one language, and how many documents were left out."""
    order = np.arange(len(documents))
    if wanted is not None:
        _rng(spec.seed, lang, 5).shuffle(order)
    rows: list[_Row] = []
    row = _begin(teacher, student)
    lost = 0
    for i in order:
        if wanted is not None and len(rows) >= wanted:
            return rows[:wanted], lost
        aligned = align(documents[i], teacher, student)
        if aligned is None:
            lost += 1
            continue
        row = _fill(rows, row, aligned, teacher, student, spec.window)
    if row.spans:
        rows.append(row)
    return rows if wanted is None else rows[:wanted], lost


def _fill(
    rows: list[_Row],
    row: _Row,
    aligned: Aligned,
    teacher: Vocabulary,
    student: Vocabulary,
    window: int,
) -> _Row:
    """Append a document's spans to `row`, full rows to `rows`; returns the row that has room."""
    if row.spans and len(row.student) == window:
        rows.append(row)
        row = _begin(teacher, student)
    elif row.spans:
        row.teacher += separator(teacher.tokenizer)
        row.student += separator(student.tokenizer)
    for a, b, c, d in aligned.spans.tolist():
        if len(row.student) + d - c > window:
            if row.spans:
                rows.append(row)
            row = _begin(teacher, student)
            if len(row.student) + d - c > window:
                continue  # one span longer than a row
        at, to = len(row.teacher), len(row.student)
        row.teacher += aligned.teacher[a:b]
        row.student += aligned.student[c:d]
        row.spans.append((at, len(row.teacher), to, len(row.student)))
    return row


def _begin(teacher: Vocabulary, student: Vocabulary) -> _Row:
    marks = [
        [] if (bos := side.tokenizer.bos_token_id) is None else [bos] for side in (teacher, student)
    ]
    return _Row(marks[0], marks[1], [])


def _divided(
    rows: list[_Row],
    languages: list[str],
    first: torch.Tensor,
    left_out: dict[str, int],
    spec: TrainSpec,
) -> tuple[TrainingData, TrainingData | None, Pairs]:
    """Rows as tensors, divided into training and held-out ones as all texts are."""
    lengths = torch.tensor([len(row.student) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row.student) for row in rows], batch_first=True
    )
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    notes = [
        f"{count} documents in {lang} are left out: the tokenizers read them as different bytes"
        for lang, count in left_out.items()
    ]
    data = TrainingData(ids, ids.where(mask, IGNORED), mask, languages, 0, notes)
    # The rows' own numbers go the same way as the rows, and tell which pairs belong to them.
    numbers = torch.arange(len(rows))[:, None]
    trail = TrainingData(numbers, numbers, torch.ones_like(numbers, dtype=torch.bool), languages)
    order = torch.cat([part.ids[:, 0] for part in _split(trail, spec) if part is not None])
    training, held_out = _split(data, spec)
    pairs = Pairs(
        [torch.tensor(rows[i].teacher) for i in order.tolist()],
        [_usable(rows[i].spans) for i in order.tolist()],
        first,
        left_out,
    )
    return training, held_out, pairs


def _usable(spans: list[tuple[int, int, int, int]]) -> torch.Tensor:
    """int64 [n, 4] of the spans that both models predict from something."""
    table = torch.tensor(spans, dtype=torch.int64).reshape(-1, 4)
    return table[(table[:, 0] > 0) & (table[:, 2] > 0)]
