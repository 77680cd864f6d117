"""finetune() and `distaya finetune`: from a folder to a folder, with its record."""

import json
import signal
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import distaya_ext
from distaya_ext import compress, evaluate, load
from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.cli.app import app
from distaya_ext.errors import InputError, UsageError
from distaya_ext.recipe import Recipe
from distaya_ext.train import events, fit, loop, plot
from distaya_ext.train.finetune import finetune
from distaya_ext.train.publish import work_folder
from distaya_ext.train.spec import TrainSpec

NANO = Path(distaya_ext.__file__).parent / "assets" / "nano-aya"
TEXTS = {
    lang: (NANO.parent / "texts" / "calibration" / f"{lang}.txt").read_text().splitlines()[:6]
    for lang in ("en", "fr")
}
SPEC = TrainSpec(
    rank=4,
    steps=3,
    window=64,
    batch_tokens=256,
    learning_rate=1e-3,
    warmup=0.0,
    held_out=0.25,
    evaluate_every=1,
    save_every=1,
)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    def draw(metrics, folder):
        for name in ("loss.png", "loss.svg"):
            (folder / name).write_text("a picture")

    monkeypatch.setattr(plot, "plot_losses", draw)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """nano-aya with 4-bit weights under a 2:4 mask in the first layers and dense ones above."""
    out = tmp_path_factory.mktemp("small") / "model"
    above = [r"layers\.[2-7]\."]
    recipe = Recipe(model=str(NANO), method="magnitude", nm="2:4", bits=4, skip=above)
    compress(str(NANO), out, recipe)
    return out


def spec(**fields) -> TrainSpec:
    return SPEC.model_copy(update=fields)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = open_checkpoint(folder, packed=True)
    return {name: tensor.clone() for name, tensor in found.read(found.entries).items()}


def test_a_compressed_model_learns_and_keeps_its_format(small, tmp_path):
    out = tmp_path / "out"
    found = finetune(small, out, TEXTS, spec())
    course = found.course
    assert course.best_step and course.best_loss < course.held_out[0][1]
    before, after = tensors(small), tensors(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("layers." in name and "weight" in name for name in changed)
    assert not any(name.endswith(("packed", "scale", "zero_point")) for name in changed)
    assert (out / "adapter").is_dir() and found.merged.beside and found.merged.merged
    record = json.loads((out / "training.json").read_text())
    assert record == found.record
    assert record["spec"]["rank"] == 4 and record["loss"] == "cross entropy"
    assert record["course"]["best_loss"] == course.best_loss
    assert record["before"]["all"]["nll"] == pytest.approx(course.held_out[0][1], rel=1e-4)
    assert record["after"]["all"]["nll"] == pytest.approx(course.best_loss, rel=1e-4)
    assert set(record["after"]) == {"en", "fr", "all"}
    assert set(record["texts"]["tokens_per_language"]) == {"en", "fr"}
    assert {"torch", "transformers", "accelerate"} <= set(record["versions"])
    lines = plot.read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert (out / "loss.png").is_file() and not work_folder(out).exists()
    model = load(out)  # with what was learnt: what fit() measured is what the folder holds
    seen = evaluate(out, TEXTS, against=small, window=64).nll
    assert seen < evaluate(small, TEXTS, window=64).nll
    assert model.config.num_hidden_layers == 8


def test_stopped_and_given_again(small, tmp_path):
    """The first SIGINT ends the step; the same call goes on and gives the same folder."""
    whole, out, told = tmp_path / "whole", tmp_path / "out", []
    finetune(small, whole, TEXTS, spec())

    def stop(event):
        told.append(event)
        if isinstance(event, events.TrainStep) and event.step == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        finetune(small, out, TEXTS, spec(), on_event=stop)
    assert told[-1] == events.Stopped("SIGINT after step 2 of 3; the same call goes on from there")
    assert not out.exists() and work_folder(out).is_dir()
    words = r"rank was 4 and is 8;.*; remove that folder to start anew"
    with pytest.raises(InputError, match=words):
        finetune(small, out, TEXTS, spec(rank=8))
    assert finetune(small, out, TEXTS, spec()).course.resumed_from == 2
    before, after = tensors(whole), tensors(out)
    assert all(torch.equal(before[name], after[name]) for name in before)
    beside = [folder / "adapter" / "adapter_model.safetensors" for folder in (whole, out)]
    assert beside[0].read_bytes() == beside[1].read_bytes()
    assert not work_folder(out).exists()


def test_a_loss_that_is_no_number_keeps_the_work(small, tmp_path, monkeypatch):
    terms, calls = loop.Loop.terms, []

    def broken(self, data, rows):
        found, count = terms(self, data, rows)
        calls.append(torch.is_grad_enabled())
        bad = calls[-1] and sum(calls) == 2
        return ({**found, "loss": found["loss"] * float("nan")} if bad else found), count

    monkeypatch.setattr(loop.Loop, "terms", broken)
    out = tmp_path / "out"
    with pytest.raises(fit.TrainingError, match=r"step 2 of 3 .* the loss is nan") as caught:
        finetune(small, out, TEXTS, spec())
    best = work_folder(out) / "best"
    assert str(best) in str(caught.value) and (best / "parameters.safetensors").is_file()
    assert not out.exists()


def test_what_is_refused_before_anything_is_learnt(small, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for out, texts, asked, sentence in (
        (tmp_path / "full", TEXTS, spec(), "is not empty"),
        (small, TEXTS, spec(), "is the model folder itself"),
        (tmp_path / "out", {}, spec(), "no text in any language"),
        (tmp_path / "out", {"en": ["short"]}, spec(), "too little text for one window of 64"),
        (tmp_path / "out", TEXTS, spec(window=4096, batch_tokens=4096), "exceed the model's 2048"),
    ):
        with pytest.raises((InputError, UsageError), match=sentence):
            finetune(small, out, texts, asked)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


# ---- the command ----


def run(*args: str):
    return CliRunner().invoke(app, ["finetune", *map(str, args)])


def texts(folder: Path) -> Path:
    folder.mkdir()
    for lang, lines in TEXTS.items():
        (folder / f"{lang}.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_the_command(tmp_path):
    file = tmp_path / "spec.yaml"
    file.write_text("steps: 9\nwindow: 64\nrank: 2\nheld_out: 0.25\nevaluate_every: 1\n")
    out = tmp_path / "out"
    where = texts(tmp_path / "texts")
    flags = ("--steps", "2", "--batch-tokens", "256", "--also", "norms", "--precision", "float32")
    done = run(NANO, "--texts", where, "--out", out, "--spec", file, *flags, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    asked = said["spec"]
    assert (asked["steps"], asked["rank"], asked["window"]) == (2, 2, 64)  # flags win
    assert asked["also"] == ["norms"] and said["course"]["precision"] == "float32"
    assert said["written"]["merged"] and (out / "training.json").is_file()
    assert "parameters learn in 2 steps of 4 rows (float32)" in done.stderr
    assert "nats per label by language: " in done.stderr and "(gained most)" in done.stderr
    assert "held-out text after step 2" in done.stderr and "steps 2/2, loss" in done.stderr


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        ((), 2, "say what to train on"),
        (("--texts", "none", "--train", "partly"), 2, "train 'partly' is not usable"),
        (("--texts", "none", "--steps", "0"), 2, "steps 0 is not usable"),
        (("--texts", "none", "--batch-tokens", "8"), 2, "less than one window of 256"),
        (("--texts", "none"), 3, "text folder none does not exist"),
        (("--texts", "none", "--device", "abacus"), 2, "device 'abacus' is unknown"),
    ],
)
def test_a_wrong_command_says_why(tmp_path, flags, code, sentence):
    done = run(NANO, "--out", tmp_path / "out", *flags)
    assert done.exit_code == code and sentence in done.stderr
    assert done.stderr.count("Error: ") == 1 and not list(tmp_path.iterdir())
