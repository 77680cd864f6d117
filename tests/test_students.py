"""Comparing students: sizes, tokenizers and losses by hand, and the reasons of the choice."""

import math
from pathlib import Path

import numpy as np
import pytest
import speaking
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.errors import InputError, UsageError
from distaya_ext.evaluate import load
from distaya_ext.students import students
from distaya_ext.students.choose import GUARD, recommend
from distaya_ext.students.facts import Facts, count_text, facts, licence, parse_budget
from distaya_ext.students.fertility import Fertility, Tokenized, fertility
from distaya_ext.students.loss import Loss, cut, sample, zero_step
from distaya_ext.students.rows import Row
from distaya_ext.students.shapes import derive, parameters

TEXTS = {lang: [line * 3 for line in lines] * 12 for lang, lines in speaking.SENTENCES.items()}
LETTERS = "abcdefghijklmnopqrstuvwxyz "


def letters(unknown: str | None = "<unk>") -> PreTrainedTokenizerFast:
    """One token per letter; whatever else there is, is unknown."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3}
    vocabulary |= {letter: 4 + i for i, letter in enumerate(LETTERS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    marks = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=unknown, **marks)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Cohere teacher, a smaller Llama of its tokenizer, and one of letters alone."""
    root = tmp_path_factory.mktemp("students")
    speaking.save_model(root / "teacher", seed=1)
    for name, vocab, tokenizer in (("alike", 300, speaking.tokenizer()), ("abc", 40, letters())):
        sizes = tiny.SIZES | {"vocab_size": vocab, "hidden_size": 16, "intermediate_size": 24}
        tiny.make(root / name, LlamaConfig(num_hidden_layers=1, **sizes))
        tokenizer.save_pretrained(root / name)
    return root


# ---- sizes ----


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_parameters_are_those_of_the_model(family, tmp_path):
    tiny.make(tmp_path / "m", tiny.FAMILIES[family])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    found = facts(checkpoint)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    embed, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert found.embedding == embed.numel()
    assert found.head == (0 if head is embed else head.numel()) and found.tied == (head is embed)
    ids = tiny.windows(1, 7).ids
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    held = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    assert found.kv_bytes == held // 7
    assert found.weight_bytes == checkpoint.nbytes
    budget = found.parameters - 1
    for cut_by, shape in derive(checkpoint, budget).items():
        assert parameters(checkpoint, shape) <= budget, cut_by
    assert parameters(checkpoint, derive(checkpoint, budget)["depth"]) < found.parameters


@pytest.mark.parametrize(
    ("text", "count"),
    [("1.5B", 1_500_000_000), ("500M", 500_000_000), ("8e8", 800_000_000), (12, 12), ("3k", 3000)],
)
def test_budgets(text, count):
    assert parse_budget(text) == count


@pytest.mark.parametrize("text", ["", "B", "-3M", "0", "1.5GB", "many", "nan", "9e99", "1e3e3"])
def test_no_budget(text):
    with pytest.raises(UsageError, match=r"a number of parameters such as 1\.5B"):
        parse_budget(text)


def test_counts_as_words():
    assert [count_text(n) for n in (800, 12_340, 1.5e9)] == ["800", "12.3K", "1.5B"]


def test_licences(tmp_path):
    assert licence(tmp_path) is None
    (tmp_path / "LICENSE.txt").write_text("\n   Apache License\nVersion 2.0\n")
    assert licence(tmp_path) == "Apache License"
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\nlicense: mine\n")
    assert licence(tmp_path) == "cc-by-nc-4.0"


# ---- tokenizers ----


def test_fertility_by_hand():
    found = fertility(letters(), {"en": ["the cat", "a dog sat"], "ja": ["ab猫犬"]})
    en, ja = found.languages
    assert (en.tokens, en.characters, en.bytes, en.words) == (16, 16, 16, 5)
    assert (en.per_character, en.per_word, en.unknown) == (1.0, 3.2, 0.0)
    assert (ja.tokens, ja.characters, ja.bytes, ja.words) == (4, 4, 8, None)
    assert (ja.bytes_per_token, ja.unknown, ja.lossless) == (2.0, 0.5, 0.0)
    assert found.tokens_per_byte == 20 / 24 and found.worst(1) == [en]
    whole = fertility(speaking.tokenizer(), {"ja": ["猫は 日", "x"]}).languages[0]
    assert whole.lossless == 1.0 and whole.unknown == 0.0


def test_the_same_tokenizer_has_the_same_digest():
    lines = {"en": ["read the file"]}
    first = fertility(speaking.tokenizer(), lines).digest
    assert first == fertility(speaking.tokenizer(), lines).digest
    assert first != fertility(letters(), lines).digest
    # The same vocabulary that cuts otherwise is another tokenizer.
    other = speaking.tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert first != fertility(other, lines).digest


# ---- losses ----


def test_pieces_give_the_text_again():
    text = "one two  three\nfour fivefivefivefive six" * 5
    pieces = cut(text, 16)
    assert "".join(pieces) == text and max(map(len, pieces)) <= 16
    found = sample({"en": [text, "second", "third"]}, 204, 20, piece=16)
    assert "".join(found.pieces["en"]) == text + "seco"
    assert found.rest["en"] == ["third"] and "".join(found.lines["en"]) == "one two  threefour "
    with pytest.raises(InputError, match="nothing to score in xx"):
        sample({"xx": [" \n "]}, 10, 10)


def test_bits_per_byte_are_what_the_model_needs(folders):
    loaded = load(folders / "abc")
    pieces = {"en": ["the cat", "water boils"]}
    found = zero_step(loaded, pieces)
    for bits, text in zip(found.bits["en"], pieces["en"], strict=True):
        ids = torch.tensor([[1, *(4 + LETTERS.index(x) for x in text)]])
        with torch.no_grad():
            log = loaded.model(input_ids=ids).logits[0, :-1].double().log_softmax(dim=-1)
        nll = -log.gather(1, ids[0, 1:, None]).sum()
        assert bits == pytest.approx(float(nll) / math.log(2), rel=1e-5)
    assert found.mean == pytest.approx(found.bits["en"].sum() / 18)
    delta, span = found.over(found)
    assert delta == 0 and span == (0, 0)


def test_a_text_longer_than_the_model_is_refused(folders):
    with pytest.raises(InputError, match="64 positions and a piece of en has 81 tokens"):
        zero_step(load(folders / "abc"), {"en": ["a" * 80]})


# ---- the choice ----


def row(name, parameters=100, bits=(1.0, 1.0), unknown=0.0, fits=True, same=None, spread=0.0):
    """A row with one piece per byte and language."""
    x = Facts("llama", 1, 8, 8, 1, 1, 9, True, parameters, 20, 0, "float32", 400, 8, None)
    languages = [Fertility(lang, 10, 10, 2, 5, 1.0, unknown) for lang in ("en", "hi")]
    noise = spread * np.array([1.0, -1.0, 0.5, -0.5])
    each = {"en": bits[0] + noise, "hi": bits[1] + noise}
    loss = Loss(each, {lang: np.ones(4) for lang in each})
    same_tokens = Tokenized(languages, name)
    return Row(name, facts=x, tokenized=same_tokens, same_tokenizer=same, fits=fits, loss=loss)


def test_fewest_bits_win_and_the_reasons_say_so():
    rows = [row("a", bits=(1.15, 1.25)), row("b", bits=(1.0, 1.1)), row("c", fits=False)]
    advice = recommend(rows, 1000)
    assert advice.name == "b"
    text = " ".join(advice.reasons)
    assert "100 of 1,000 parameters" in text and "20 % of them in the embedding" in text
    assert "1.050 bits per byte" in text and "0.150 (95 %: 0.150 to 0.150) fewer than a" in text
    assert "chance" not in text and "worst language is hi with 1.100" in text


def test_a_difference_within_chance_is_called_that():
    rows = [row("a", spread=0.9), row("b", bits=(1.02, 1.02))]
    assert "may be chance" in " ".join(recommend(rows, 1000).reasons)


def test_the_worst_language_is_guarded():
    fair, lopsided = row("fair", bits=(1.5, 1.5)), row("lopsided", bits=(0.5, 1.5 * GUARD + 0.01))
    assert recommend([fair, lopsided], 1000).name == "lopsided"  # fair is 3 times worse in en
    even = row("even", bits=(0.6, 1.5))
    advice = recommend([even, row("bad", bits=(0.1 + 0.5, 1.5 * GUARD + 0.01))], 1000)
    assert advice.name == "even"
    assert any(r.startswith("bad is passed over: in hi it needs 1.26") for r in advice.reasons)
    assert recommend([row("deaf", unknown=0.2), row("b", bits=(1.1, 1.1))], 1000).name == "b"
    everyone = recommend([row("deaf", unknown=0.2), row("dumb", unknown=0.1)], 1000)
    assert any("Every candidate fails the guard" in r for r in everyone.reasons)


def test_what_would_change_the_choice():
    rows = [
        row("best", parameters=100, same=False),
        row("small", parameters=60, bits=(1.1, 1.1), same=False),
        row("alike", parameters=90, bits=(1.2, 1.2), same=True),
    ]
    advice = recommend(rows, 1000)
    changes = " ".join(advice.changes)
    assert advice.name == "best" and "only byte-aligned spans" in " ".join(advice.reasons)
    assert "With fewer than 100 parameters allowed it would be small (60)" in changes
    assert "token by token, alike is the best (1.200" in changes
    assert "For speed, small takes" in changes


def test_none_fits_or_none_can_be_scored():
    rows = [row("a", parameters=900, fits=False), row("b", parameters=500, fits=False)]
    with pytest.raises(InputError, match="smallest found is b with 500"):
        recommend(rows, 400)
    with pytest.raises(InputError, match="b with 500, and it is no smaller than the teacher"):
        recommend(rows, 600)
    with pytest.raises(InputError, match="no candidate can be read; x: gone"):
        recommend([Row("x", error="gone")], 400)
    with pytest.raises(
        InputError, match="smallest found is a shape cut out of the teacher with 77"
    ):
        recommend(rows, 40, 77)
    broken = row("a")
    broken.loss, broken.error = None, "NaN in layer 3"
    with pytest.raises(InputError, match=r"none of the 1 students that fit .* a: NaN in layer 3"):
        recommend([broken], 400)


# ---- the whole ----


def test_the_whole_comparison(folders):
    teacher = folders / "teacher"
    size = facts(open_checkpoint(teacher)).parameters
    names = [folders / "alike", folders / "abc", folders / "none", teacher]
    found = students(
        names, TEXTS, size - 1, teacher=teacher, languages=["en", "es"], characters=240
    )
    assert found.languages == ["en", "es"] and found.teacher.compute == 1.0
    alike, abc, none, same = (found[str(name)] for name in names)
    assert (alike.same_tokenizer, abc.same_tokenizer) == (True, False)
    assert alike.fits and abc.fits and not same.fits and "neither an existing folder" in none.error
    assert any("a student has fewer" in note for note in found.notes)
    flop = 2 * (alike.facts.inside + 300 * 16)
    assert alike.flop_per_byte == pytest.approx(flop * alike.tokenized.tokens_per_byte)
    assert alike.compute == pytest.approx(alike.flop_per_byte / found.teacher.flop_per_byte)
    made = [r for r in found.rows if r.shape is not None]
    assert {"depth", "mlp"} <= {r.cut for r in made} and all(r.fits for r in made)
    assert all(r.loss is not None and r.error is None for r in made)
    assert all(r.name == f"teacher cut by {r.cut}" for r in made)
    assert found.advice.name in {r.name for r in found.rows if r.fits}
    told = found.to_dict()
    assert told["students"][1]["route"] == "spans" and len(told["reasons"]) >= 3


@pytest.mark.parametrize(
    ("models", "more", "words"),
    [
        ([], {}, "there is no candidate"),
        (["a", "a"], {}, "the candidate a is named twice"),
        (["a"], {"languages": ["en", "tlh"]}, "there is no text in tlh; the texts are in en, es"),
        (["a"], {"budget": "much"}, "a number of parameters"),
        (["a"], {"characters": 0}, "0 characters cannot be scored"),
    ],
)
def test_what_makes_no_sense(models, more, words):
    budget = more.pop("budget", "1B")
    with pytest.raises(UsageError, match=words):
        students(models, TEXTS, budget, **more)


def test_a_teacher_within_the_budget_gives_no_shape(folders):
    found = students([folders / "abc"], TEXTS, "1B", teacher=folders / "teacher", characters=60)
    assert [r.name for r in found.rows] == [str(folders / "abc")]
    assert any("the teacher itself" in note for note in found.notes)
    with pytest.raises(InputError, match="no student fits into 10 parameters; the smallest found"):
        students([Path(folders / "abc")], TEXTS, 10)
    with pytest.raises(UsageError, match="there is no candidate: the teacher has 2"):
        students([], TEXTS, "1B", teacher=folders / "teacher", characters=60)
    with pytest.raises(
        InputError, match="smallest found is a shape cut out of the teacher with 3,960"
    ):
        students([], TEXTS, 100, teacher=folders / "teacher", characters=60)
