"""How a training ends badly, and what a work folder is good for then."""

import multiprocessing
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from fitting import Scripted, data, same, spec, state, tiny_model

from distaya_ext.errors import InputError, LostError, ResourceError, UsageError, notes
from distaya_ext.train import events, plot, publish
from distaya_ext.train.data import IGNORED, TrainingData
from distaya_ext.train.finetune import CrossEntropy
from distaya_ext.train.fit import TrainingError, fit


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(plot, "plot_losses", lambda *_: [])


@pytest.mark.parametrize(
    ("accident", "reason"),
    [
        ({"nan": 4}, r"the loss is nan \(loss nan, size nan\)"),
        ({"jump": 4}, "the gradient's norm is nan at a loss of"),
    ],
)
def test_a_loss_that_is_no_number(tmp_path, accident, reason):
    training, held_out = data()
    asked = spec(steps=8, schedule="constant")
    good = tiny_model()
    fit(good, training, held_out, Scripted(), asked.model_copy(update={"steps": 2}), tmp_path / "a")
    model, told = tiny_model(), []
    with pytest.raises(TrainingError) as caught:
        fit(
            model,
            training,
            held_out,
            Scripted(**accident),
            asked,
            tmp_path / "b",
            on_event=told.append,
        )
    sentence = str(caught.value)
    assert re.search(reason, sentence)
    assert "in step 4 of 8 at a learning rate of 0.01" in sentence and "\n" not in sentence
    look = [event for event in told if isinstance(event, events.Evaluated)][-1]
    assert f"of step 2 with a held-out loss of {look.loss:.4f}" in sentence and look.step == 2
    assert str(tmp_path / "b" / "best") in sentence and caught.value.exit_code == 3
    assert same(state(model), state(good))
    assert isinstance(told[-1], events.Stopped) and told[-1].reason == sentence


def test_nan_without_held_out_rows_leaves_the_last_checkpoint(tmp_path):
    training, _ = data()
    model = tiny_model()
    before = state(model)
    with pytest.raises(TrainingError, match=r"parameters of step 0 are in .*checkpoint-00000000"):
        fit(model, training, None, Scripted(nan=2), spec(), tmp_path)
    assert same(state(model), before)


def test_a_finished_training_is_not_done_again(tmp_path):
    training, held_out = data()
    first, second = tiny_model(), tiny_model()
    course = fit(first, training, held_out, CrossEntropy(), spec(), tmp_path)
    text = course.metrics.read_text()
    told = []
    again = fit(second, training, held_out, CrossEntropy(), spec(), tmp_path, on_event=told.append)
    assert same(state(first), state(second)) and course.metrics.read_text() == text
    assert again.resumed_from == 4 and course.resumed_from is None
    assert again.to_dict() == {**course.to_dict(), "resumed_from": 4}
    assert [type(event) for event in told] == [events.Started, events.Resumed]


def test_what_is_said_before_the_first_step(tmp_path, monkeypatch):
    training, held_out = data(rows=3)
    told = []
    fit(tiny_model(), training, held_out, CrossEntropy(), spec(), tmp_path, on_event=told.append)
    assert told[1] == events.Notice("a step takes 4 rows and there are 3, so rows repeat within it")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    told.clear()
    fit(tiny_model(), training, held_out, CrossEntropy(), spec(), tmp_path, on_event=told.append)
    assert re.search(r"made with \d+ threads and this run has 77", told[2].message)


def test_a_disk_that_is_too_full(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    training, held_out = data()
    with pytest.raises(ResourceError, match=r"only 0\.00 GiB are free there"):
        fit(tiny_model(), training, held_out, CrossEntropy(), spec(), tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"learning_rate": 0.5},
            r"step 4 of another training: spec\.learning_rate was 0\.01 and is 0\.5",
        ),
        ({"precision": "bfloat16"}, "precision was 'float32' and is 'bfloat16'"),
        ({"path": "elsewhere", "save_every": 3}, None),
    ],
)
def test_another_training_in_the_folder(tmp_path, change, sentence):
    training, held_out = data()
    fit(tiny_model(), training, held_out, CrossEntropy(), spec(), tmp_path)
    asked = (tiny_model(), training, held_out, CrossEntropy(), spec(**change), tmp_path)
    if sentence is None:
        assert fit(*asked).resumed_from == 4
        return
    with pytest.raises(InputError, match=sentence):
        fit(*asked)


def test_other_texts_other_weights_and_other_parameters_in_the_folder(tmp_path):
    training, held_out = data()
    model = tiny_model()
    model.model.embed_tokens.requires_grad_(False)
    fit(model, training, held_out, CrossEntropy(), spec(), tmp_path)
    with pytest.raises(InputError, match=r"texts\.training was .* and is .*; texts\.held_out was"):
        fit(model, held_out, training, CrossEntropy(), spec(), tmp_path)
    with pytest.raises(InputError, match="objective was 'cross entropy' and is 'Scripted'"):
        fit(model, training, held_out, Scripted(), spec(), tmp_path)
    with pytest.raises(
        InputError, match=r"learning\.model\.embed_tokens\.weight was not there and is \[97, 64\]"
    ):
        fit(tiny_model(), training, held_out, CrossEntropy(), spec(), tmp_path)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    with pytest.raises(InputError, match=r"training: weights was .* and is"):
        fit(model, training, held_out, CrossEntropy(), spec(), tmp_path)


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    training, held_out = data()
    first, second = tiny_model(), tiny_model()
    fit(first, training, held_out, CrossEntropy(), spec(), tmp_path)
    file = tmp_path / "checkpoint-00000004" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    course = fit(second, training, held_out, CrossEntropy(), spec(), tmp_path)
    assert course.resumed_from == 2 and same(state(first), state(second))


def _hold(work, ready, done):
    from distaya_ext.train.fit import _alone

    with _alone(work):
        ready.set()
        done.wait(60)


def test_two_processes_in_one_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, done))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(UsageError, match=rf"another run \(process {other.pid}\) is at work in"):
            fit(tiny_model(), *data(), CrossEntropy(), spec(), tmp_path)
    finally:
        done.set()
        other.join()


def test_what_cannot_be_trained(tmp_path, monkeypatch):
    training, held_out = data()
    still = tiny_model().requires_grad_(False)
    with pytest.raises(UsageError, match="nothing of the model requires a gradient"):
        fit(still, training, held_out, CrossEntropy(), spec(), tmp_path)
    with pytest.raises(UsageError, match=r"embed_tokens.weight is .* and is bfloat16"):
        fit(tiny_model().bfloat16(), training, held_out, CrossEntropy(), spec(), tmp_path)
    empty = training.take(torch.tensor([], dtype=torch.int64))
    with pytest.raises(InputError, match="0 windows to train on"):
        fit(tiny_model(), empty, held_out, CrossEntropy(), spec(), tmp_path)
    mute = TrainingData(
        training.ids, torch.full_like(training.ids, IGNORED), training.mask, training.languages
    )
    with pytest.raises(InputError, match="step 1 of the training has no label"):
        fit(tiny_model(), mute, None, CrossEntropy(), spec(), tmp_path / "mute")
    with monkeypatch.context() as patch, pytest.raises(UsageError, match="WORLD_SIZE says 2"):
        patch.setenv("WORLD_SIZE", "2")
        fit(tiny_model(), training, held_out, CrossEntropy(), spec(), tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs accelerate and matplotlib: pip install"):
        fit(tiny_model(), training, held_out, CrossEntropy(), spec(), tmp_path)


def test_a_lost_rank_stays_that_and_tells_what_is_kept(tmp_path, monkeypatch):
    lost = LostError("rank 1 of 2 was killed or lost")
    lost.exit_code = 3  # of the rank that failed

    def fails(*args, **more):
        (tmp_path / "work" / "checkpoint-7").mkdir(parents=True)
        raise lost

    monkeypatch.setattr(publish, "fit", fails)
    monkeypatch.setattr(publish, "check_place", lambda *args: None)
    given = SimpleNamespace(folder=tmp_path), SimpleNamespace(model=None)
    with pytest.raises(LostError) as raised:
        publish.train_and_publish(
            *given, None, None, None, None, tmp_path / "out", about={}, work=tmp_path / "work"
        )
    assert raised.value is lost and lost.exit_code == 3
    assert notes(lost) == [f"what was trained is kept in {tmp_path / 'work'}"]
