"""Tokens of one's own for a language: who gets how much, and how little of a file is read."""

import itertools
import json
import random
import re
import tracemalloc
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from speaking import SENTENCES, save_model, save_texts, tokenizer

from distaya_ext.compress import compress
from distaya_ext.documents import open_texts, read_texts
from distaya_ext.errors import InputError
from distaya_ext.recipe import Recipe
from distaya_ext.texts import planned, windows

TEXTS = {lang: lines * 40 for lang, lines in SENTENCES.items()}


def cut(quotas, tokens=240, texts=TEXTS, seed=0):
    return windows(texts, tokenizer(), tokens=tokens, window=8, seed=seed, quotas=quotas)


def refused(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()


def test_named_languages_get_what_was_asked_and_the_others_share_the_rest():
    got = cut({"en": 160})
    assert got.tokens_per_language == {"en": 160, "es": 40, "ja": 40}
    assert Counter(got.languages) == {"en": 20, "es": 5, "ja": 5}
    assert got.ids.shape == (30, 8) and (got.ids[:, 0] == 1).all() and got.left_out == []
    # No long stretch without a language: the windows of each are spread over all.
    places = [at for at, lang in enumerate(got.languages) if lang == "ja"]
    assert max(b - a for a, b in itertools.pairwise(places)) <= 7


def test_nothing_left_for_the_others_is_told():
    got = cut({"en": 160, "ja": 72})  # 8 tokens are left, one window
    assert got.tokens_per_language == {"en": 160, "es": 8, "ja": 72}
    assert cut({"en": 160, "ja": 79}).left_out == ["es"]
    assert cut({"en": 80}, tokens=None).left_out == ["es", "ja"]
    got = cut({"en": 0})
    assert got.left_out == ["en"] and got.tokens_per_language == {"es": 120, "ja": 120}


def test_quotas_follow_the_seed_and_take_no_window_twice():
    quotas = {"en": 160, "es": 40}
    assert torch.equal(cut(quotas).ids, cut(quotas).ids)
    assert not torch.equal(cut(quotas).ids, cut(quotas, seed=1).ids)
    draw = random.Random(0)
    texts = {"en": [str(draw.randrange(10**30)) for _ in range(4000)]}
    got = cut({"en": 800}, 800, texts)
    assert len(set(map(tuple, got.ids.tolist()))) == 100


def test_equal_quotas_stand_in_turn():
    got = cut({"en": 80, "es": 80, "ja": 80})
    assert got.languages == ["en", "es", "ja"] * 10


def test_no_quotas_give_the_windows_they_always_gave():
    """Numbers made by the code before quotas existed."""
    got = windows(TEXTS, tokenizer(), tokens=250, window=8, seed=3)
    assert got.languages == ["en", "es", "ja"] * 10
    assert int((got.ids * torch.arange(1, 241).view(30, 8)).sum()) == 5008290


@pytest.mark.parametrize(
    "quotas, tokens, sentence",
    [
        ({"xx": 8, "yy": 8}, 240, "quota for xx, yy, but the texts are in en, es, ja"),
        ({"en": 7}, 240, "7 tokens for en does not fill one window of 8"),
        ({"en": -8}, 240, "-8 tokens for en does not fill"),
        ({"en": 200, "ja": 48}, 240, "248 tokens, more than the 240 allowed; raise tokens"),
        ({"en": 0, "es": 0, "ja": 0}, 240, "every quota is 0"),
        ({"en": 0}, 15, "15 tokens are fewer than one window of 8 in each of 2"),
    ],
)
def test_quotas_that_cannot_be(quotas, tokens, sentence):
    refused(lambda: cut(quotas, tokens), re.escape(sentence))


def test_a_language_with_too_little_is_told_with_counts():
    texts = {**TEXTS, "ja": ["猫は日なたで寝ている"]}
    refused(lambda: cut({"ja": 80}, texts=texts), r"quotas in tokens: ja has \d+ of 80")
    got = cut({"en": 80}, texts=texts)
    assert got.limited_by == "ja"
    assert got.tokens_per_language["es"] == got.tokens_per_language["ja"]


def test_planned_counts():
    languages = ["en", "es", "ja"]
    assert planned(languages, 250, 8, None) == {"en": 10, "es": 10, "ja": 10}
    assert planned(languages, None, 8, None) == dict.fromkeys(languages)
    assert planned(languages, 250, 8, {"en": 100}) == {"en": 12, "es": 9, "ja": 9}


# ---- streams ----


def save(folder, suffix, lines):
    path = folder / f"en{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": lines}), path, row_group_size=len(lines))
    else:
        turn = str if suffix == ".txt" else (lambda line: json.dumps({"text": line}))
        path.write_text("".join(turn(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_small_quota_reads_little_of_a_large_file(tmp_path, suffix):
    lines = [f"line {i} says {i * i} and {i * 7 % 1001} and nothing more" for i in range(200_000)]
    save(tmp_path, suffix, lines)
    size = (tmp_path / f"en{suffix}").stat().st_size
    del lines
    tracemalloc.start()
    got = cut({"en": 800}, 800, open_texts(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert got.tokens_per_language == {"en": 800}
    assert peak < min(size, 4 << 20)


def test_what_stands_behind_the_quota_is_not_read(tmp_path):
    save(tmp_path, ".jsonl", [f"line {i} says {i * i}" for i in range(2000)])
    with open(tmp_path / "en.jsonl", "a") as file:
        file.write("no JSON\n")
    refused(lambda: read_texts(tmp_path), "line 2001 is not a JSON object")
    before = cut({"en": 80}, 80, open_texts(tmp_path))
    refused(lambda: cut({"en": 80_000}, 80_000, open_texts(tmp_path)), "line 2001")
    whole = {"en": [f"line {i} says {i * i}" for i in range(2000)]}
    assert torch.equal(before.ids, cut({"en": 80}, 80, whole).ids)


def test_documents_can_be_read_again(tmp_path):
    documents = open_texts(save(tmp_path, ".txt", ["a", "", "b"]))["en"]
    assert list(documents) == list(documents) == ["a", "b"]
    (tmp_path / "en.txt").write_text("\n \n")
    refused(lambda: list(documents), "en.txt is empty")


# ---- whole runs ----


def test_a_run_with_quotas_is_repeated_by_its_recipe(tmp_path):
    model = save_model(tmp_path / "model")
    texts = save_texts(tmp_path / "texts", repeat=40)
    spec = {"quotas": {"en": 320, "ja": 160}, "tokens": 480, "window": 16, "weights": "worst"}
    recipe = Recipe(model=str(model), nm="2:4", quality="plain", calibration=spec)
    report = compress(model, tmp_path / "out", recipe, texts)
    assert report.tokens_per_language == {"en": 320, "ja": 160}
    assert "no calibration tokens are left for es" in report.notices
    told = json.loads((tmp_path / "out" / "results.json").read_text())["calibration"]["languages"]
    assert {lang: facts["windows"] for lang, facts in told.items()} == {"en": 20, "ja": 10}
    assert 0 < told["en"]["fertility"] < told["ja"]["fertility"]
    assert told["en"]["bytes_per_token"] >= 1
    assert told["en"]["share"][0] == told["ja"]["share"][0] == 0.5  # equal to begin with
    compress(model, tmp_path / "again", Recipe.from_yaml(tmp_path / "out" / "recipe.yaml"))
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert files[0] == files[1]


def test_a_recipe_for_other_languages_is_refused(tmp_path):
    model = save_model(tmp_path / "model")
    texts = save_texts(tmp_path / "texts", repeat=40)
    for spec, words in (
        ({"quotas": {"fr": 320}}, "quota for fr, but the texts are in en, es, ja"),
        ({"weights": {"fr": 2.0}}, "weight for fr, but the calibration windows are in en, es, ja"),
    ):
        spec |= {"tokens": 480, "window": 16}
        recipe = Recipe(model=str(model), nm="2:4", quality="plain", calibration=spec)
        refused(lambda recipe=recipe: compress(model, tmp_path / "out", recipe, texts), words)
    assert not (tmp_path / "out").exists()
