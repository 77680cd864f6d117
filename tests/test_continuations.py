"""Greedy continuations and the scripts they are in."""

import copy

import numpy as np
import pytest
import torch
from refusing import refused
from speaking import SENTENCES, save_model, save_texts, tokenizer
from typer.testing import CliRunner

from distaya_ext.cli.app import app
from distaya_ext.cli.generate import go_on
from distaya_ext.errors import UsageError
from distaya_ext.evaluate import Loaded, beginnings, evaluate, load
from distaya_ext.evaluate.continuations import (
    Prompt,
    Spoken,
    side_by_side,
    speak,
    write,
    wrong_script,
)
from distaya_ext.evaluate.statistics import difference_interval, interval


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return save_model(root / "a", seed=1), save_model(root / "b", seed=2)


@pytest.fixture(scope="module")
def loaded(models):
    return load(models[0])


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return save_texts(tmp_path_factory.mktemp("texts"), repeat=4)


def by_hand(model, ids, count):
    """The likeliest token, again and again, without a cache."""
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids[None]).logits[0, -1:].argmax(-1)])
        if ids[-1] == 2:
            return ids[:-1]
    return ids


def test_prompts_are_the_beginnings_of_texts(loaded):
    read = tokenizer()
    long = {"en": ["a", "one two three four five six seven eight nine ten", SENTENCES["en"][0]]}
    found = beginnings(long | {"ja": SENTENCES["ja"]}, loaded, 2, 8)
    assert [p.language for p in found] == ["en", "en", "ja", "ja"]  # "a" is one token
    for prompt, text in zip(found, [*long["en"][1:], *SENTENCES["ja"]], strict=False):
        ids = read(text, add_special_tokens=False)["input_ids"]
        assert prompt.ids.tolist() == [1, *ids[: min(16, len(ids) // 2)]]
        assert prompt.text and text.startswith(prompt.text)
    assert len(found[0].ids) == 17


def test_a_batch_writes_what_each_row_writes_alone(loaded):
    prompts = beginnings(SENTENCES, loaded, 3, 12)
    assert len({len(p.ids) for p in prompts}) > 1  # several batches
    spoken = speak(loaded, prompts, 12)
    for prompt, text in zip(prompts, spoken.texts, strict=True):
        whole = by_hand(loaded.model, prompt.ids, 12)
        assert text == loaded.tokenizer.decode(whole[len(prompt.ids) :], skip_special_tokens=True)
    assert speak(loaded, prompts, 12).texts == spoken.texts
    assert any(spoken.texts)


def test_one_loop_writes_for_generate_too(loaded):
    ids = tokenizer()(SENTENCES["en"][0], add_special_tokens=False)["input_ids"]
    (new,) = write(loaded, torch.tensor([[1, *ids]]), 9)
    said = go_on(loaded, SENTENCES["en"][0], max_new_tokens=9)
    assert said == loaded.tokenizer.decode(new, skip_special_tokens=True)


def test_nothing_behind_the_end_is_kept(loaded):
    rows = torch.tensor([[1, 40, 50], [1, 60, 70]])
    free = write(loaded, rows, 6)
    model = copy.deepcopy(loaded.model)
    model.generation_config.eos_token_id = [int(free[0][2]), 2]
    ended = write(Loaded("ended", model, loaded.tokenizer), rows, 6)
    first = free[0].tolist().index(int(free[0][2]))
    assert ended[0].tolist() == free[0][:first].tolist()
    other = free[1].tolist()
    stop = other.index(int(free[0][2])) if int(free[0][2]) in other else 6
    assert ended[1].tolist() == other[:stop]


def test_too_many_new_tokens_for_the_model(loaded):
    refused(UsageError, lambda: beginnings(SENTENCES, loaded, 1, 127), "127", "128 positions")
    assert all(len(p.ids) == 2 for p in beginnings(SENTENCES, loaded, 1, 126))


def spoken(**texts):
    prompts = [Prompt(lang, "p", torch.tensor([1])) for lang, said in texts.items() for _ in said]
    return Spoken(prompts, [text for said in texts.values() for text in said])


def test_shares_and_their_difference():
    model = spoken(ru=["мир abcd", "привет", "xy"], en=["один two"])
    base = spoken(ru=["мир ab", "привет", "1 2 3"], en=["one two"])
    found = wrong_script("ru", model, base)
    assert found.prompts == 3
    assert found.share == pytest.approx(6 / 15) and found.base == pytest.approx(2 / 11)
    assert found.delta == pytest.approx(6 / 15 - 2 / 11)
    assert found.interval[0] <= found.delta <= found.interval[1]
    assert wrong_script("en", model, base).interval is None  # one prompt has no spread
    assert wrong_script("en", model, None).share == pytest.approx(4 / 7)
    assert wrong_script("ru", model, model).interval == (0.0, 0.0)


def test_what_cannot_be_measured_is_none():
    assert wrong_script("xx", spoken(xx=["abc"]), None) is None
    assert wrong_script("en", spoken(ru=["abc"]), None) is None
    silent = wrong_script("en", spoken(en=["12", "!"]), spoken(en=["ab", "cd"]))
    assert (silent.share, silent.base, silent.delta) == (None, 0.0, None)


def test_the_interval_of_a_difference():
    rng = np.random.default_rng(4)
    a, b, w = rng.integers(0, 9, 12) * 1.0, rng.integers(0, 9, 12) * 1.0, np.full(12, 9.0)
    assert difference_interval(a, w, b, w) == pytest.approx(interval(a - b, w))
    assert difference_interval(a[:1], w[:1], b[:1], w[:1]) is None
    assert difference_interval(a, w, b, w * 0) is None


def test_an_evaluation_holds_them(models, texts):
    found = evaluate(models[1], texts, against=models[0], window=16, continuations=2, new_tokens=7)
    told = found.to_dict()
    assert told["continuations"]["per_language"] == 2 and told["continuations"]["new_tokens"] == 7
    assert len(told["samples"]) == 6
    assert all(set(s) == {"language", "prompt", "base", "model"} for s in told["samples"])
    for row in found.languages:
        own = [s for s in told["samples"] if s["language"] == row.language]
        scripts = ("Latn",) if row.language != "ja" else ("Hani", "Hira", "Kana")
        for key, share in (("model", row.wrong_script), ("base", row.base_wrong_script)):
            from distaya_ext.evaluate.scripts import letters

            counted = [letters(s[key], scripts) for s in own]
            total = sum(c.all for c in counted)
            assert share == (sum(c.wrong for c in counted) / total if total else None)
    again = evaluate(models[1], texts, against=models[0], window=16, continuations=2, new_tokens=7)
    assert again.samples == found.samples and again["ja"].wrong_script == found["ja"].wrong_script


def test_none_are_written_where_none_are_asked_for(models, texts):
    told = evaluate(models[0], texts, window=16, continuations=0).to_dict()
    assert told["samples"] == [] and "continuations" not in told
    assert all(row["wrong_script"] is row["base_wrong_script"] is None for row in told["languages"])


def test_a_language_nobody_knows_is_named(models):
    texts = {"xx": SENTENCES["en"] * 4, "en": SENTENCES["en"] * 4}
    found = evaluate(models[0], texts, window=16, continuations=1, new_tokens=4)
    assert "not measured for xx" in found.to_dict()["notes"][0]
    assert found["xx"].wrong_script is None and len(found.samples) == 2
    assert side_by_side(spoken(en=["a"]), None)[0]["base"] is None


def test_the_table_shows_them_with_english_beside_the_worst(models, texts):
    asked = ["eval", str(models[1]), "--against", str(models[0]), "--texts", str(texts), "-q",
             "--window", "16", "--continuations", "1", "--new-tokens", "9"]  # fmt: skip
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 0, told.output
    for word in ("wrong script", "KL p99", "top-1 same", "bits/byte", "PPL ratio"):
        assert word in told.stdout
    (verdict,) = [line for line in told.stdout.splitlines() if line.startswith("worst ")]
    assert "English" in verdict
    alone = CliRunner().invoke(app, ["eval", str(models[1]), *asked[4:]])
    (verdict,) = [line for line in alone.stdout.splitlines() if line.startswith("worst ")]
    assert "English" in verdict and "nats" in verdict


def test_the_worst_is_never_shown_without_a_word_on_english(models, tmp_path):
    from distaya_ext.cli.output import verdict

    for languages, said in ((["ja", "es"], "English: not in the texts"), (["en"], "itself")):
        texts = {lang: SENTENCES[lang] * 4 for lang in languages}
        found = evaluate(models[1], texts, against=models[0], window=16, continuations=0)
        assert said in verdict(found)
