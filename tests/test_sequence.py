"""Text a teacher writes: greedy is argmax, killed is resumed, what is learnt is what it wrote."""

import json
from pathlib import Path

import pytest
import torch
from test_align import WORDS
from transformers import AutoModelForCausalLM, LlamaConfig

import distaya_ext
from distaya_ext import read_texts
from distaya_ext.errors import InputError, UsageError
from distaya_ext.tokenizer import load_tokenizer
from distaya_ext.train import sequence
from distaya_ext.train.distill import distill
from distaya_ext.train.events import Evaluated, Notice
from distaya_ext.train.sequence import sequence_data, write
from distaya_ext.train.spec import TrainSpec

ASSETS = Path(distaya_ext.__file__).parent / "assets"
TEXTS = {lang: read_texts(ASSETS / "texts" / "calibration")[lang] for lang in ("en", "ja")}
SPEC = TrainSpec(window=16, batch_tokens=32, tokens=10 * 2 * 16, held_out=0.2)


@pytest.fixture(scope="module")
def teacher():
    return AutoModelForCausalLM.from_pretrained(ASSETS / "nano-aya", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ASSETS / "nano-aya", 8192)


def test_greedy_text_is_the_most_probable_token_each_time(teacher, tokenizer, tmp_path):
    said = []
    found = write(teacher, tokenizer, TEXTS, SPEC, tmp_path / "w.jsonl", on_event=said.append)
    assert len(found) == 20 and {one.language for one in found} == {"en", "ja"}
    assert "20 prompts of 4 tokens by up to 12, greedily; 0 are there" in said[0].message
    whole = {text for lines in TEXTS.values() for text in lines}
    one = next(one for one in found if one.language == "en")
    assert any(one.prompt.strip() in text for text in whole)
    ids = [tokenizer.bos_token_id, *tokenizer(one.prompt, add_special_tokens=False)["input_ids"]]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + 12 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(teacher(torch.tensor([ids])).logits[0, -1].argmax()))
    assert one.text == tokenizer.decode(ids[start:], skip_special_tokens=True).rstrip("\ufffd")


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_killed_run_ends_with_the_same_text(
    teacher, tokenizer, tmp_path, monkeypatch, temperature
):
    whole = write(teacher, tokenizer, TEXTS, SPEC, tmp_path / "a", temperature=temperature)
    before = torch.get_rng_state()
    monkeypatch.setattr(sequence, "BATCH", 16)
    lines = (tmp_path / "a").read_text().splitlines(keepends=True)
    (tmp_path / "b").write_text("".join(lines[:18]) + lines[18][:9])  # killed within a line
    calls = []
    kept = sequence._continue
    monkeypatch.setattr(sequence, "_continue", lambda *a: calls.append(1) or kept(*a))
    again = write(teacher, tokenizer, TEXTS, SPEC, tmp_path / "b", temperature=temperature)
    assert again == whole and len(calls) == 1
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert write(teacher, tokenizer, TEXTS, SPEC, tmp_path / "b", temperature=temperature) == whole
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_and_temperatures_write_other_text(teacher, tokenizer, tmp_path):
    cool = write(teacher, tokenizer, TEXTS, SPEC, tmp_path / "0")
    warm = write(teacher, tokenizer, TEXTS, SPEC, tmp_path / "1", temperature=1.0)
    assert [one.text for one in cool] != [one.text for one in warm]
    with pytest.raises(InputError, match="another teacher, other prompts or other settings"):
        write(teacher, tokenizer, TEXTS, SPEC, tmp_path / "1", temperature=0.5)
    with pytest.raises(UsageError, match="temperature is -1"):
        write(teacher, tokenizer, TEXTS, SPEC, tmp_path / "2", temperature=-1.0)


def test_another_teacher_is_told_apart(teacher, tokenizer, tmp_path):
    write(teacher, tokenizer, TEXTS, SPEC, tmp_path / "w")
    weight = teacher.model.norm.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0] += 1
        with pytest.raises(InputError, match="another teacher"):
            write(teacher, tokenizer, TEXTS, SPEC, tmp_path / "w")
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_only_what_the_teacher_wrote_is_learnt(teacher, tokenizer, tmp_path):
    """For a student whose bytes are unknown."""
    cache = tmp_path / "w.jsonl"
    training, held_out = sequence_data(teacher, tokenizer, WORDS, TEXTS, SPEC, cache)
    lines = [json.loads(line) for line in cache.read_text().splitlines()[1:]]
    answers = [WORDS(line["text"], add_special_tokens=False)["input_ids"] for line in lines]
    rows = 0
    for data in (training, held_out):
        assert data.window <= SPEC.window
        for labels in data.labels:
            learnt = labels[labels != -100].tolist()
            assert learnt and any(answer[: len(learnt)] == learnt for answer in answers)
            rows += 1
    dropped = [note for note in training.notes if "empty or too long" in note]
    assert rows == len(lines) - (int(dropped[0].split()[0]) if dropped else 0)
    assert held_out.first == len(training)


def test_distill_says_that_the_teacher_writes(tmp_path):
    """The whole way, to a student of words whose bytes are unknown."""
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    student.save_pretrained(tmp_path / "student")
    WORDS.save_pretrained(tmp_path / "student")
    given = SPEC.model_copy(
        update={"train": "full", "steps": 8, "precision": "float32", "learning_rate": 1e-2}
    )
    said = []
    distill(
        ASSETS / "nano-aya", tmp_path / "student", tmp_path / "out", TEXTS, given,
        on_event=said.append,
    )  # fmt: skip
    notices = [event.message for event in said if isinstance(event, Notice)]
    assert any("learns text that the teacher writes" in message for message in notices)
    assert any("continues 20 prompts of 4 tokens" in message for message in notices)
    losses = [event.loss for event in said if isinstance(event, Evaluated)]
    assert losses[-1] < losses[0]
    assert json.loads((tmp_path / "out" / "training.json").read_text())["route"] == "sequence"


def test_chats_are_refused(teacher, tokenizer, tmp_path):
    chats = tmp_path / "en.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    with pytest.raises(UsageError, match="chats cannot be continued"):
        write(teacher, tokenizer, chats, SPEC, tmp_path / "w")
