"""Reading texts: whatever is broken is told with its place; windows are balanced and fixed."""

import json
from collections import Counter
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import refusing
import torch
from speaking import SENTENCES, save_texts, tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import distaya_ext.documents as documents_module
from distaya_ext.errors import InputError
from distaya_ext.evaluate import cut_lines, cut_windows
from distaya_ext.texts import read_texts, windows

refused = partial(refusing.refused, InputError)


def write(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_three_formats_give_the_same(tmp_path):
    lines = SENTENCES["ja"]
    write(tmp_path, "ja.txt", "\ufeff" + "\r\n".join(lines) + "\r\n\r\n")
    write(tmp_path, "zh-Hant.jsonl", "".join(json.dumps({"text": s, "n": 1}) + "\n" for s in lines))
    pq.write_table(pa.table({"text": lines, "other": [1, 2, 3]}), tmp_path / "fil.parquet")
    write(tmp_path, "notes.md", "not read")
    write(tmp_path, ".hidden.txt", "not read")
    assert read_texts(tmp_path) == {"fil": lines, "ja": lines, "zh-Hant": lines}


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("en.txt", b"", ["en.txt", "empty"]),
        ("en.txt", b"\n  \n", ["en.txt", "empty"]),
        ("en.txt", b"good\nb\xffd\n", ["en.txt", "line 2", "0xff", "byte 6"]),
        ("en.txt", b"\xef\xbb\xbfb\xffd\n", ["line 1", "0xff", "byte 4"]),
        ("en.txt", b"good\nb\0d\n", ["line 2", "NUL", "byte 6"]),
        ("English.txt", b"text\n", ["English.txt", "language code"]),
        ("README.txt", b"text\n", ["README.txt", "language code"]),
        ("en_US.txt", b"text\n", ["en_US.txt", "language code"]),
        ("en.jsonl", b'{"text": "a"}\n{"text": 1}\n', ["line 2", '"text"']),
        ("en.jsonl", b'["text"]\n', ["line 1", '"text"']),
        ("en.jsonl", b'{"text": "a"\n', ["line 1", "JSON"]),
        ("en.jsonl", b"[" * 100_000 + b"\n", ["line 1", "JSON"]),
        ("en.jsonl", b'{"text": "a\\u0000b"}\n', ["line 1", "NUL"]),
        ("en.jsonl", b'{"text": "a\\ud800b"}\n', ["line 1", "surrogate"]),
        ("en.parquet", b"PAR1 no", ["en.parquet", "readable parquet"]),
        ("en.csv", b"text\n", ["holds no", "<lang>.txt"]),
    ],
)
def test_broken_files(tmp_path, name, content, words):
    refused(lambda: read_texts(write(tmp_path, name, content)), *words)


def test_broken_columns(tmp_path):
    path = tmp_path / "en.parquet"
    pq.write_table(pa.table({"body": ["a"]}), path)
    refused(lambda: read_texts(tmp_path), '"text"', "none")
    pq.write_table(pa.table({"text": [1, 2]}), path)
    refused(lambda: read_texts(tmp_path), '"text"', "int64")
    pq.write_table(pa.table({"text": ["a", None]}), path)
    refused(lambda: read_texts(tmp_path), "row 2", "no text")


def test_folders_that_are_none(tmp_path):
    refused(lambda: read_texts(tmp_path / "none"), "none", "does not exist")
    refused(lambda: read_texts(write(tmp_path, "f", "x") / "f"), "is a file")
    (tmp_path / "empty").mkdir()
    refused(lambda: read_texts(tmp_path / "empty"), "holds no")


def test_absurdly_long_line(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "MAX_LINE_BYTES", 1000)
    write(tmp_path, "en.txt", "short\n" + "x" * 1000 + "\n")
    refused(lambda: read_texts(tmp_path), "en.txt line 2", "longer than 1000 bytes")
    write(tmp_path, "en.txt", "x" * 999 + "\n")
    assert len(read_texts(tmp_path)["en"][0]) == 999


def test_parallel_lines_must_pair(tmp_path):
    folder = save_texts(tmp_path)
    assert read_texts(folder, parallel=True) == SENTENCES
    write(folder, "es.txt", "uno\ndos\n")
    refused(lambda: read_texts(folder, parallel=True), "en 3, es 2, ja 3")
    write(folder, "es.txt", "uno\n\ntres\ncuatro\n")
    refused(lambda: read_texts(folder, parallel=True), "es.txt line 2", "blank")
    assert read_texts(folder)["es"] == ["uno", "tres", "cuatro"]


def cut(tokens=None, window=8, seed=0, repeat=40, bos=True):
    texts = {lang: lines * repeat for lang, lines in SENTENCES.items()}
    return windows(texts, tokenizer(bos), tokens=tokens, window=window, seed=seed)


def test_windows_are_balanced_and_begin_with_bos():
    got = cut(tokens=250)
    assert got.ids.shape == (30, 8) and got.ids.dtype == torch.int64 and got.ids.is_contiguous()
    assert Counter(got.languages) == {"en": 10, "es": 10, "ja": 10}
    assert got.languages[:4] == ["en", "es", "ja", "en"]
    assert (got.ids[:, 0] == 1).all()
    assert got.tokens_per_language == {"en": 80, "es": 80, "ja": 80}
    assert got.per_language == 10 and got.limited_by is None


def test_each_row_is_text_of_its_language():
    got = cut(tokens=3 * 8 * 5)
    joined = {lang: "".join(lines) for lang, lines in SENTENCES.items()}
    read = tokenizer()
    for row, lang in zip(got.ids, got.languages, strict=True):
        for piece in read.decode(row[1:], clean_up_tokenization_spaces=False).split("<bos>"):
            assert piece.strip("\ufffd") in joined[lang]


def test_windows_follow_the_seed_and_nothing_else():
    first, again, other = cut(tokens=250), cut(tokens=250), cut(tokens=250, seed=1)
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, other.ids)
    only = {"ja": SENTENCES["ja"] * 40}
    alone = windows(only, tokenizer(), tokens=80, window=8, seed=0)
    assert torch.equal(alone.ids, first.ids[2::3])  # other languages do not change these


def test_windows_without_bos_and_all_there_is():
    got = cut(window=6, bos=False, repeat=1)
    lengths = {
        lang: sum(len(ids) for ids in tokenizer(False)(lines)["input_ids"])
        for lang, lines in SENTENCES.items()
    }
    assert got.per_language == min(lengths.values()) // 6
    assert len(set(map(tuple, got.ids.tolist()))) == len(got.ids)


def test_fertility_and_bytes_per_token():
    got = cut(repeat=1)
    for lang, lines in SENTENCES.items():
        tokens = sum(len(ids) for ids in tokenizer()(lines, add_special_tokens=False)["input_ids"])
        assert got.fertility[lang] == tokens / sum(map(len, lines))
        assert got.bytes_per_token[lang] == sum(len(s.encode()) for s in lines) / tokens


def test_shortest_language_limits_all_and_is_named():
    texts = {"en": SENTENCES["en"] * 50, "ja": SENTENCES["ja"]}
    got = windows(texts, tokenizer(), tokens=4000, window=8)
    assert got.limited_by == "ja"
    assert Counter(got.languages) == {"en": got.per_language, "ja": got.per_language}


def test_script_the_vocabulary_does_not_know():
    core = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    latin = PreTrainedTokenizerFast(tokenizer_object=core)
    texts = {"en": ["ab" * 9], "ja": SENTENCES["ja"]}
    refused(lambda: windows(texts, latin, tokens=9, window=2), "28 characters of ja into no token")
    refused(lambda: cut_windows(texts, latin, window=2), "of ja into no token")
    refused(lambda: cut_lines(texts, latin, longest=99), "of ja into no token")


def test_repeated_documents_are_counted():
    texts = {"en": ["a", "b", "a", "a"], "es": ["c", "d"]}
    assert windows(texts, tokenizer(), tokens=None, window=2).duplicates == {"en": 2}


def test_too_little_text():
    texts = {"en": SENTENCES["en"] * 50, "ja": ["猫"]}
    refused(lambda: windows(texts, tokenizer(), tokens=640, window=64), "64 tokens", "ja 4")
    refused(lambda: cut(tokens=23), "23 tokens", "3 languages", "24 tokens")
    refused(lambda: cut(window=1), "at least 2", "1")
    refused(lambda: windows({}, tokenizer(), tokens=9, window=2), "no text")
