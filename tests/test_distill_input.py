"""What distill refuses in a sentence, and the routes it takes between different tokenizers."""

import math

import pytest
import speaking
import torch
from teaching import WINDOW, load, make, record, save, spec, told
from tokenizers_of_tests import words

from distaya_ext.errors import InputError, ResourceError, UsageError
from distaya_ext.train.distill import distill
from distaya_ext.train.spec import TrainSpec


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"))


def refused(made, error, match, tmp_path, *, teacher=None, student=None, texts=None, given=None):
    out = tmp_path / "out"
    with pytest.raises(error, match=match):
        distill(
            teacher or made.teacher, student or made.dropped, out, texts or made.texts,
            given or spec(),
        )  # fmt: skip
    assert not out.exists()


def test_a_student_larger_than_its_teacher_is_refused(made, tmp_path):
    match = r"student has \d+ weights, more than the \d+ of its teacher"
    swapped = {"teacher": made.dropped, "student": made.teacher}
    refused(made, UsageError, match, tmp_path, **swapped)


def test_the_teacher_as_its_own_student_is_refused(made, tmp_path):
    refused(made, UsageError, "is the teacher itself", tmp_path, student=made.teacher)


def test_absent_layers_are_refused(made, tmp_path):
    given = spec({"cosine": 1.0, "layers": [(1, 1), (3, 4)]})
    match = "3:4 .* student has 2 layers.* the teacher 4"
    refused(made, UsageError, match, tmp_path, given=given)


def test_a_cache_and_hidden_states_are_refused(made, tmp_path):
    given = spec({"kl": 1.0, "cosine": 1.0, "cache": 8})
    refused(made, UsageError, "no hidden states, which cosine compare", tmp_path, given=given)
    refused(
        made, UsageError, "weight of kl is 0", tmp_path,
        given=spec({"kl": 0.0, "ce": 1.0, "cache": 8}),
    )  # fmt: skip
    sized = spec({"kl": 1.0, "cache_bytes": 100})
    refused(made, UsageError, "no number of tokens", tmp_path, given=sized)


def test_a_cache_that_is_too_large_is_refused(made, tmp_path):
    given = spec({"kl": 1.0, "cache": 64, "cache_bytes": 100_000})
    match = r"takes \d+ bytes, more than the 100000 allowed; \d+ would fit"
    refused(made, ResourceError, match, tmp_path, given=given)
    more = spec({"kl": 1.0, "cache": 301})
    refused(made, UsageError, "301 most probable .* has 300", tmp_path, given=more)


def test_empty_texts_are_refused(made, tmp_path):
    empty = tmp_path / "texts"
    empty.mkdir()
    refused(made, InputError, "holds no <lang>.txt", tmp_path, texts=empty)
    (empty / "en.txt").write_text("\n")
    refused(made, InputError, "is empty", tmp_path, texts=empty)


def test_an_output_that_is_in_the_way_is_refused(made, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        distill(made.teacher, made.dropped, out, made.texts, spec())
    assert (out / "mine.txt").read_text() == "mine"
    with pytest.raises(InputError, match="is the model folder itself"):
        distill(made.teacher, made.dropped, made.teacher, made.texts, spec())


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A smaller model with a tokenizer of other merges."""
    folder = tmp_path_factory.mktemp("foreign") / "model"
    save(folder, seed=1, hidden_size=16, num_hidden_layers=2, initializer_range=0.02)
    lines = ["entirely different words make entirely different merges"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speaking, "SENTENCES", {"en": lines * 9})
        speaking.tokenizer().save_pretrained(folder)
    return folder


def test_another_tokenizer_takes_the_aligned_route_and_says_so(made, foreign, tmp_path):
    events, out = [], tmp_path / "out"
    given = TrainSpec(**spec(train="full").model_dump(exclude={"loss"}))
    distill(made.teacher, foreign, out, made.texts, given, on_event=events.append)
    assert any("tokenizers differ" in message for message in told(events))
    about = record(out)
    assert about["route"] == "spans" and about["spec"]["loss"]["spans"] > 0
    assert about["after"]["all"]["nll"] < about["before"]["all"]["nll"]
    assert load(out).config.vocab_size == 300


def test_a_tokenizer_whose_bytes_are_unknown_learns_text_the_teacher_writes(made, tmp_path):
    events, out = [], tmp_path / "out"
    lines = [line for each in speaking.SENTENCES.values() for line in each]
    student = save(tmp_path / "student", seed=1, hidden_size=16, num_hidden_layers=2)
    words(lines, 200).save_pretrained(student)
    given = spec({"ce": 1.0, "kl": 0.0}, train="full", steps=4, tokens=20 * WINDOW)
    distill(made.teacher, student, out, made.texts, given, on_event=events.append)
    assert any("text that the teacher writes" in message for message in told(events))
    assert record(out)["route"] == "sequence"
    assert record(out)["after"]["all"]["nll"] < record(out)["before"]["all"]["nll"]


def test_what_is_undefined_between_tokenizers_is_refused(made, foreign, tmp_path):
    for name in ("kl", "cosine"):
        match = rf"{name} .* undefined between different tokenizers"
        given = spec({"kl": 0.0, name: 1.0})
        refused(made, UsageError, match, tmp_path, student=foreign, given=given)
    cached = spec({"cache": 8})
    refused(made, UsageError, "tokens are not compared", tmp_path, student=foreign, given=cached)


def test_a_loss_that_is_not_finite_keeps_the_best_so_far(made, tmp_path, monkeypatch):
    from distaya_ext.train import distillation

    plain, calls = distillation.losses.total, []

    def total(terms, weights):
        calls.extend([1] * torch.is_grad_enabled())  # in steps, not on held-out text
        return plain(terms, weights) * (math.nan if len(calls) == 8 else 1.0)

    monkeypatch.setattr(distillation.losses, "total", total)
    with pytest.raises(InputError, match=r"the loss is nan.*best parameters so far"):
        distill(made.teacher, made.dropped, tmp_path / "out", made.texts, spec(evaluate_every=5))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.training" / "best" / "parameters.safetensors").is_file()
