"""What a model learns from: rows of text and of chats, their labels, and what is held out."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import distaya_ext
from distaya_ext.errors import InputError
from distaya_ext.train.data import IGNORED, TrainingData, from_texts
from distaya_ext.train.spec import TrainSpec

NANO = Path(distaya_ext.__file__).parent / "assets" / "nano-aya"
TEXTS = NANO.parent / "texts" / "calibration"
SPEC = TrainSpec(window=32, batch_tokens=32)
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }};{% endgeneration %}"
    "{% else %}{{ m.content }};{% endif %}{% endfor %}"
)
LAST_ONLY = "{{ messages[-1].content }}"  # what came before is forgotten


@pytest.fixture(scope="module")
def nano():
    return AutoTokenizer.from_pretrained(NANO)


@pytest.fixture
def tokenizer(nano):
    yield nano
    nano.chat_template = None


def spec(**fields) -> TrainSpec:
    return SPEC.model_copy(update=fields)


def chat(*turns: str) -> dict:
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": said}


def write(path: Path, *records) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return path


# ---- text ----


def test_windows_are_split_by_language(tokenizer):
    training, held_out = from_texts(TEXTS, tokenizer, spec(tokens=32 * 23 * 10, held_out=0.2))
    assert training.ids.shape == (23 * 8, 32) and held_out.ids.shape == (23 * 2, 32)
    for lang in set(training.languages):
        assert training.languages.count(lang) == 8 and held_out.languages.count(lang) == 2
    assert training.first == 0 and held_out.first == len(training)
    assert torch.equal(training.ids, training.labels) and bool(training.mask.all())
    rows = {tuple(row) for row in training.ids.tolist()}
    assert not rows & {tuple(row) for row in held_out.ids.tolist()}
    assert training.labelled == 23 * 8 * 31
    assert training.tokens_per_language == dict.fromkeys(training.languages, 8 * 32)


def test_the_split_is_seeded(tokenizer):
    first, again, other = (
        from_texts(TEXTS, tokenizer, spec(tokens=20000, held_out=0.1, seed=seed))
        for seed in (0, 0, 1)
    )
    assert [part.digest() for part in first] == [part.digest() for part in again]
    assert first[1].digest() != other[1].digest()


def test_without_a_number_of_tokens_every_language_gives_all_it_has(tokenizer):
    texts = {"en": ["some words " * 200], "fr": ["quelques mots " * 20]}
    training, held_out = from_texts(texts, tokenizer, spec(held_out=0.0))
    assert held_out is None
    assert training.languages.count("en") > 3 * training.languages.count("fr") > 0
    equal, _ = from_texts(texts, tokenizer, spec(tokens=1 << 20, held_out=0.0))
    assert equal.languages.count("en") == equal.languages.count("fr")
    assert "fr has text for" in equal.notes[0]


def test_quotas(tokenizer):
    asked = spec(quotas={"en": 320, "fr": 96}, held_out=0.0)
    training, _ = from_texts({lang: ["a b c " * 400] for lang in ("en", "fr")}, tokenizer, asked)
    assert training.tokens_per_language == {"en": 320, "fr": 96}


def test_a_share_is_at_least_a_window_and_never_all(tokenizer):
    texts = {"en": ["some words " * 40]}
    for share, held in ((0.001, 1), (0.999, None)):
        training, held_out = from_texts(texts, tokenizer, spec(held_out=share))
        assert len(training) >= 1 and len(held_out) >= 1
        assert len(held_out) == (held or len(held_out)) and (held or len(training) == 1)


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ({}, "no text in any language"),
        ({"en": ["a few words"]}, r"too little text for one window of 32 tokens in en \d+ tokens"),
        ({"en": ["one two " * 18]}, "give 1 row of up to 32 tokens; training needs at least 2"),
        (
            {"en": ["a b " * 99], "fr": ["one two " * 18]},
            "fr has one row of up to 32 tokens, which cannot be split",
        ),
    ],
)
def test_texts_that_are_too_short(tokenizer, texts, sentence):
    with pytest.raises(InputError, match=sentence):
        from_texts(texts, tokenizer, SPEC)


def test_tokens_beyond_the_embedding(tokenizer):
    with pytest.raises(InputError, match=r"hold token \d+, but the model's embedding has 40 rows"):
        from_texts({"en": ["some words " * 200]}, tokenizer, SPEC, vocabulary=40)


def test_an_empty_file_and_an_absent_folder(tokenizer, tmp_path):
    (tmp_path / "en.txt").write_text("\n \n")
    with pytest.raises(InputError, match=r"en\.txt is empty: it holds no text"):
        from_texts(tmp_path, tokenizer, SPEC)
    with pytest.raises(InputError, match="does not exist"):
        from_texts(tmp_path / "none", tokenizer, SPEC)


# ---- chats ----


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_what_the_assistant_says_is_learnt(tokenizer, tmp_path, template):
    tokenizer.chat_template = template
    talks = [chat("Hello", "Good day", "And you?", "Fine, thanks"), chat("Hi", "Hey there")]
    file = write(tmp_path / "en.jsonl", *talks)
    training, _ = from_texts(file, tokenizer, spec(window=64, held_out=0.0))
    assert training.languages == ["en", "en"]
    said = [
        tokenizer.decode(row[row != IGNORED], skip_special_tokens=True) for row in training.labels
    ]
    assert said == ["Good day;Fine, thanks;", "Hey there;"]
    whole = tokenizer.decode(training.ids[0][training.mask[0]], skip_special_tokens=True)
    assert whole == "<user>Hello;<assistant>Good day;<user>And you?;<assistant>Fine, thanks;"
    short = int(training.mask[1].sum())  # padded on the right, where nothing is learnt
    assert short < training.window and not training.mask[1, short:].any()
    assert bool((training.labels[1, short:] == IGNORED).all())
    batch = training.batch([1])
    assert batch.ids.shape == (1, short) and batch.rows.tolist() == [1]


def test_long_chats_are_cut_and_mute_ones_left_out(tokenizer, tmp_path):
    tokenizer.chat_template = PLAIN
    long, mute = chat("Hi", "word " * 99), chat("word " * 99, "yes")
    write(tmp_path / "en.jsonl", chat("a", "b"), long, mute)
    training, _ = from_texts(tmp_path, tokenizer, spec(held_out=0.0))
    assert len(training) == 2 and training.window == 32
    assert training.notes == [
        "chats left out, since the assistant says nothing in their first 32 tokens: 1",
        "chats longer than 32 tokens, which were cut there: 2",
    ]


def test_chats_are_balanced_by_tokens(tokenizer, tmp_path):
    tokenizer.chat_template = PLAIN
    for lang, count in (("en", 30), ("fr", 10)):
        write(tmp_path / f"{lang}.jsonl", *[chat(f"n {i}", f"m {i}") for i in range(count)])
    training, _ = from_texts(tmp_path, tokenizer, spec(tokens=160, held_out=0.0))
    counts = training.tokens_per_language
    assert max(counts.values()) <= 80 and min(counts.values()) > 60
    quotas, _ = from_texts(tmp_path, tokenizer, spec(quotas={"fr": 40}, tokens=140, held_out=0.0))
    assert quotas.tokens_per_language["fr"] <= 40 < 80 < quotas.tokens_per_language["en"] <= 100


@pytest.mark.parametrize(
    ("line", "template", "sentence"),
    [
        ('{"messages": [', PLAIN, "line 2 is not a JSON object"),
        ('{"text": "a"}', PLAIN, 'line 2 is not an object with a list of "messages"'),
        ('{"messages": []}', PLAIN, 'line 2 is not an object with a list of "messages"'),
        ('{"messages": [{"role": "user"}]}', PLAIN, 'message 1 lacks a string "role" or "content"'),
        (json.dumps(chat("a", "b")), None, "the tokenizer has no chat template"),
        (json.dumps(chat("a", "b")), LAST_ONLY, "line 1: under this chat template"),
        (
            json.dumps(chat("a", "b")),
            "{{ raise_exception('roles must alternate') }}",
            "line 1 does not fit the chat template: roles must alternate",
        ),
    ],
)
def test_what_is_no_chat(tokenizer, tmp_path, line, template, sentence):
    tokenizer.chat_template = template
    file = tmp_path / "en.jsonl"
    file.write_text(json.dumps(chat("Hello", "Good day")) + "\n" + line + "\n")
    with pytest.raises(InputError, match=sentence):
        from_texts(file, tokenizer, SPEC)


def test_chats_and_text_in_one_folder(tokenizer, tmp_path):
    write(tmp_path / "en.jsonl", chat("a", "b"))
    (tmp_path / "fr.txt").write_text("quelques mots\n")
    with pytest.raises(InputError, match=r"chats \(en\.jsonl\) and plain text \(fr\.txt\)"):
        from_texts(tmp_path, tokenizer, SPEC)


def test_a_file_of_text_is_not_guessed_at(tokenizer, tmp_path):
    (tmp_path / "en.txt").write_text("some words\n")
    with pytest.raises(InputError, match="is a file without chats"):
        from_texts(tmp_path / "en.txt", tokenizer, SPEC)


def test_rows_must_fit_together():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="differ in shape"):
        TrainingData(ids, ids[:1], ids.bool(), ["en", "en"])
    with pytest.raises(ValueError, match="2 rows and 1 languages"):
        TrainingData.of_windows(ids, ["en"])
