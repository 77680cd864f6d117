"""Texts of the quality bench: splits that share nothing, windows that are the same every time."""

import json
import sys
from pathlib import Path

import pytest
import quality_case
import torch
from quality_case import save_texts
from speaking import SENTENCES

sys.path.append(str(Path(__file__).resolve().parent.parent))
from bench import quality, quality_texts


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    return quality_case.arguments(tmp_path_factory.mktemp("bench"))


def test_the_split_check_sees_shared_documents(words, tmp_path, capsys):
    train, test = save_texts(tmp_path / "a", 1), save_texts(tmp_path / "b", 2)
    assert quality_texts.shared(train, test).documents == []
    line = (train / "en.txt").read_text().splitlines()[3]
    with open(test / "en.txt", "a", encoding="utf-8") as file:
        file.write(f"  {line.replace(' ', '  ').upper()}\n")
    found = quality_texts.shared(train, test)
    assert len(found.documents) == 1
    call = [*words, "--split-check", "--calibration", str(train), "--test", str(test)]
    assert quality.main(call) == 1
    assert "1 documents" in capsys.readouterr().out


def test_the_split_check_knows_translations_by_their_key(tmp_path):
    for folder, lang, text in (("a", "en", "one"), ("b", "fr", "un")):
        (tmp_path / folder).mkdir()
        record = {"text": text, "doc": "guide-7"}
        (tmp_path / folder / f"{lang}.jsonl").write_text(json.dumps(record) + "\n")
    assert quality_texts.shared(tmp_path / "a", tmp_path / "b").documents == ["guide-7"]


def test_calibration_windows_by_seed(words):
    args = quality.arguments(words)
    run = quality.Run(args, print)
    first, second = (run.calibration(seed) for seed in (0, 1))
    assert first.ids.shape == second.ids.shape == (8, 32)
    assert not torch.equal(first.ids, second.ids)
    assert torch.equal(first.ids, quality.Run(args, print).calibration(0).ids)
    for one in (first, second):
        assert one.languages[:3] == one.languages[3:6] and sorted(one.languages[:3]) == [*SENTENCES]
        assert one.languages[6:] == one.languages[:2]


def test_test_windows_come_from_the_whole_file(words):
    args = quality.arguments(words)
    tokenizer = quality.Run(args, print).tokenizer
    few = quality_texts.test_windows(args.test, tokenizer, 16, 4)["en"]
    every = quality_texts.test_windows(args.test, tokenizer, 16, None)["en"]
    assert torch.equal(few, every[[len(every) * i // 4 for i in range(4)]])
    with pytest.raises(SystemExit, match="999 are needed"):
        quality_texts.test_windows(args.test, tokenizer, 16, 999)
