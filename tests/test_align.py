"""Spans of bytes that two tokenizers share: a partition of the text, in every script."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_of_tests import byte_level, pieces, words

import distaya_ext
from distaya_ext import read_texts
from distaya_ext.errors import InputError, UsageError
from distaya_ext.tokenizer import load_tokenizer
from distaya_ext.train.align import Vocabulary, align, spans
from distaya_ext.train.pairs import first_tokens, paired_data
from distaya_ext.train.route import choose_route, same_tokenizer
from distaya_ext.train.spec import LossSpec, TrainSpec

ASSETS = Path(distaya_ext.__file__).parent / "assets"
TEXTS = read_texts(ASSETS / "texts" / "calibration")
LINES = [line for lines in TEXTS.values() for line in lines]
AYA = load_tokenizer(ASSETS / "nano-aya", 8192)
SMALL = byte_level(LINES, 700)
RAW = byte_level(LINES, 400, normalise=False)
PIECES = pieces(LINES, 900)
WORDS = words(LINES, 400)
PAIRS = {
    "aya-bytes": (AYA, SMALL),
    "bytes-aya": (RAW, AYA),
    "pieces-bytes": (PIECES, SMALL),
    "bytes-pieces": (RAW, PIECES),
}

HARD = [
    *("", " ", "\n", "\t\n \n", "  two  spaces ", "x\r\ny", "123456", "'s 't"),
    *("東京は雨です。", "한국어", "\u1100\u1161", "e\u0301 und ﬁ", "½ ² Å", "a\u200bb"),
    *("مرحبا بالعالم", "नमस्ते दुनिया", "👩‍👩‍👧‍👦!", "\U0010ffff", "▁", "<0x41>"),
]
ALPHABET = "ab .,\n\t1東は한ा्हنم\u0301\u200d👩👧🏽▁<0x>é"
strings = st.one_of(
    st.text(st.sampled_from(ALPHABET), max_size=30), st.text(max_size=20), st.sampled_from(HARD)
)


def vocabularies(which: str) -> tuple[Vocabulary, Vocabulary]:
    return tuple(Vocabulary(tokenizer) for tokenizer in PAIRS[which])


@pytest.mark.parametrize("which", PAIRS)
@given(text=strings)
@settings(max_examples=40, deadline=None)
def test_spans_partition_the_text(which, text):
    teacher, student = _SIDES[which]
    found = align(text, teacher, student)
    if found is None:
        # Only where nothing is there, a normalised text differs, or <unk> stands for something.
        assert not text or _differs(text, teacher, student)
        return
    a, b, c, d = found.spans.T
    assert (a[0], c[0], b[-1], d[-1]) == (0, 0, len(found.teacher), len(found.student))
    assert (a[1:] == b[:-1]).all() and (c[1:] == d[:-1]).all()
    assert (a < b).all() and (c < d).all()
    lengths = np.diff(found.ends, prepend=0)
    ids = ((teacher, found.teacher, a, b), (student, found.student, c, d))
    for side, tokens, start, stop in ids:
        strings_of = [side.strings[token] for token in tokens]
        got = [b"".join(strings_of[i:j]) for i, j in zip(start, stop, strict=True)]
        if side.kind == "pieces" and b"".join(got) == b" " + found.data:
            got[0] = got[0][1:]
        assert b"".join(got) == found.data
        assert [len(part) for part in got] == lengths.tolist()
    # Finest: no boundary inside a span is common to both.
    left, right = teacher.pieces(found.data.decode()), student.pieces(found.data.decode())
    inside = np.intersect1d(left[2], right[2])
    assert inside[inside > 0].tolist() == found.ends.tolist()


_SIDES = {which: vocabularies(which) for which in PAIRS}


def _differs(text: str, *sides: Vocabulary) -> bool:
    read = [side.pieces(text) for side in sides]
    return None in read or read[0][1] != read[1][1] or not read[0][0]


@pytest.mark.parametrize("text", [text for text in HARD if text.strip()])
def test_byte_level_reads_every_text(text):
    found = align(text, *_SIDES["aya-bytes"])
    assert found is not None
    assert AYA.decode(found.teacher) == found.data.decode()
    assert SMALL.decode(found.student) == found.data.decode()


def test_a_text_is_what_both_read_it_as():
    """One tokenizer composes letters, the other does not: both are given the composed text."""
    found = align("e\u0301", *_SIDES["bytes-aya"])
    assert found is not None and found.data == "é".encode()


@given(
    left=st.lists(st.integers(0, 3), min_size=1, max_size=20),
    right=st.lists(st.integers(0, 3), min_size=1, max_size=20),
)
@settings(max_examples=100, deadline=None)
def test_spans_are_the_finest_common_refinement(left, right):
    """Against a walk over all bytes; tokens of no bytes among them."""
    short = sum(left) - sum(right)
    (right if short > 0 else left).append(abs(short))
    ends = [np.cumsum(side) for side in (left, right)]
    table, common = spans(*ends)
    expected = [
        p for p in range(1, int(ends[0][-1]) + 1) if p in ends[0].tolist() and p in ends[1].tolist()
    ]
    assert common.tolist() == expected
    before = [0, 0]
    for place, p in enumerate(expected):
        after = [int((side <= p).sum()) for side in ends]
        assert table[place].tolist() == [before[0], after[0], before[1], after[1]]
        before = after


def test_texts_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="3 and 4 bytes"):
        spans(np.array([1, 3]), np.array([4]))


def test_first_tokens_begin_the_same_bytes():
    teacher, student = _SIDES["aya-bytes"]
    first = first_tokens(teacher, student)
    assert first.shape == (8192,)
    special = set(AYA.all_special_ids)
    for token, at in enumerate(first.tolist()):
        if token in special:
            assert at == -1
            continue
        assert teacher.strings[token].startswith(student.strings[at])
    assert (first >= 0).sum() == 8192 - len(special)
    known = {string: i for i, string in enumerate(student.strings)}
    equal = [i for i, s in enumerate(teacher.strings) if s in known and i not in special]
    assert len(equal) > 200
    assert all(first[i] == known[teacher.strings[i]] for i in equal)


# ---- rows ----


def test_rows_hold_the_same_bytes_in_both():
    spec = TrainSpec(window=48, batch_tokens=96, held_out=0.2)
    texts = {lang: TEXTS[lang] for lang in ("en", "ja", "ar")}
    training, held_out, pairs = paired_data(texts, AYA, SMALL, spec)
    teacher, student = _SIDES["aya-bytes"]
    assert len(pairs.teacher) == len(pairs.spans) == len(training) + len(held_out)
    assert training.window <= 48 and held_out.first == len(training)
    seen = 0
    for data in (training, held_out):
        for i in range(len(data)):
            row = data.first + i
            ids = data.ids[i][data.mask[i]]
            assert (data.labels[i][data.mask[i]] == ids).all()
            assert (data.labels[i][~data.mask[i]] == -100).all()
            for a, b, c, d in pairs.spans[row].tolist():
                left = b"".join(teacher.strings[t] for t in pairs.teacher[row][a:b])
                right = b"".join(student.strings[t] for t in ids[c:d])
                assert left == right
                seen += len(left)
            assert pairs.teacher[row][0] == AYA.bos_token_id
    whole = sum(len(text.encode()) for lines in texts.values() for text in lines)
    assert 0.9 * whole < seen <= whole  # without the first span of rows, which nothing predicts
    assert paired_data(texts, AYA, SMALL, spec)[2].digest() == pairs.digest()


def test_a_language_gives_no_more_than_its_share():
    spec = TrainSpec(window=32, batch_tokens=64, held_out=0.0, tokens=3 * 4 * 32)
    texts = {lang: TEXTS[lang] for lang in ("en", "ja", "ar")}
    training, held_out, _ = paired_data(texts, AYA, SMALL, spec)
    assert held_out is None
    assert sorted(training.languages) == ["ar"] * 4 + ["en"] * 4 + ["ja"] * 4


def test_documents_read_differently_are_left_out_and_counted():
    spec = TrainSpec(window=32, batch_tokens=64, held_out=0.0)
    texts = {"en": [*TEXTS["en"], "東京"], "ja": TEXTS["ja"]}
    strange = pieces(TEXTS["en"], 400)  # no letter for 東, and no bytes of last resort for it
    strange.backend_tokenizer.model.byte_fallback = False
    training, _, pairs = paired_data(texts, AYA, strange, spec)
    assert pairs.left_out == {"en": 1, "ja": len(TEXTS["ja"])}
    assert set(training.languages) == {"en"}
    assert training.notes[0].startswith("1 documents in en are left out")
    text = {"en": ["ab", "cd"]}
    with pytest.raises(InputError, match="all 2 documents as"):
        paired_data(text, WORDS, SMALL, spec)


# ---- routes ----


def test_one_tokenizer_needs_no_spans():
    again = load_tokenizer(ASSETS / "nano-aya", 8192)
    assert same_tokenizer(AYA, again)
    assert choose_route(AYA, again, TrainSpec()).name == "logits"
    assert choose_route(AYA, again, TrainSpec()).sentence is None
    with pytest.raises(UsageError, match="these are the same"):
        choose_route(AYA, again, TrainSpec(loss=LossSpec(spans=1.0)))


def test_different_tokenizers_are_said_aloud():
    route = choose_route(AYA, SMALL, TrainSpec())
    assert route.name == "spans"
    assert "8192 and 700 tokens" in route.sentence
    assert route.loss.kl == 0 and route.loss.spans > 0 and route.loss.ce > 0
    asked = choose_route(AYA, SMALL, TrainSpec(loss=LossSpec(ce=0.25, spans=2.0)))
    assert (asked.loss.ce, asked.loss.spans, asked.loss.kl) == (0.25, 2.0, 0.0)


@pytest.mark.parametrize("term", ["kl", "cosine", "mse"])
def test_token_wise_losses_are_refused_between_tokenizers(term):
    with pytest.raises(UsageError, match=f"{term} .*undefined between different tokenizers"):
        choose_route(AYA, SMALL, TrainSpec(loss=LossSpec(**{term: 1.0})))


def test_without_bytes_the_teacher_writes():
    route = choose_route(AYA, WORDS, TrainSpec())
    assert route.name == "sequence"
    assert "the bytes behind the student's tokens are unknown" in route.sentence
    assert (route.loss.ce, route.loss.spans, route.loss.kl) == (1.0, 0.0, 0.0)
    with pytest.raises(UsageError, match="spans cannot be compared"):
        choose_route(AYA, WORDS, TrainSpec(loss=LossSpec(spans=1.0)))


def test_a_subset_of_a_vocabulary_is_another_tokenizer():
    assert not same_tokenizer(SMALL, RAW)
