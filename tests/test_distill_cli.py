"""`distaya distill` and `distaya heal` from the command line."""

import json

import pytest
import speaking
from typer.testing import CliRunner

from distaya_ext.cli.app import app
from distaya_ext.cli.distill import _asked, parse_pairs
from distaya_ext.compress import compress
from distaya_ext.errors import UsageError
from distaya_ext.recipe import Recipe
from distaya_ext.train.healing import HEALING
from distaya_ext.train.spec import TrainSpec

SHORT = [
    *("--steps", "4", "--batch-tokens", "64", "--window", "16", "--precision", "float32"),
    *("--held-out", "0.2", "--rank", "2"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    speaking.save_model(root / "dense")
    speaking.save_texts(root / "texts", repeat=20)
    recipe = Recipe(model="t", method="magnitude", sparsity=0.5)
    compress(root / "dense", root / "pruned", recipe)
    return root


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_heal_writes_a_folder_and_tells_what_was_won(made, tmp_path):
    out = tmp_path / "out"
    words = ["heal", made / "pruned", "--against", made / "dense", "--texts", made / "texts"]
    found = run(*words, "--out", out, *SHORT, "--json")
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert told["spec"]["loss"] | HEALING["loss"] == told["spec"]["loss"]
    assert told["spec"]["train"] == "lora" and told["spec"]["rank"] == 2
    assert told["states"] == [[1, 1], [2, 2]]
    assert told["after"]["all"]["kl"] < told["before"]["all"]["kl"]
    assert json.loads((out / "training.json").read_text())["after"] == told["after"]
    assert "held-out text, all: nll" in found.stderr


def test_distill_is_kl_alone_unless_told_otherwise(made, tmp_path):
    words = ["distill", made / "dense", "--student", made / "pruned", "--texts", made / "texts"]
    found = run(
        *words, "--out", tmp_path / "out", *SHORT, "--cache", 9, "--cache-size", "1MiB", "-q"
    )
    assert found.exit_code == 0, found.output
    assert found.stdout.strip() == str(tmp_path / "out") and not found.stderr.strip()
    loss = json.loads((tmp_path / "out" / "training.json").read_text())["spec"]["loss"]
    assert (loss["kl"], loss["cosine"], loss["ce"]) == (1.0, 0.0, 0.0)
    assert (loss["cache"], loss["cache_bytes"]) == (9, 1 << 20)


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--layers", "1:7"], 2, "the student has 2 layers"),
        (["--layers", "first"], 2, "neither last, nor all, nor pairs"),
        (
            ["--cache", "64", "--cache-size", "2KiB"],
            5,
            "more than the 2048 allowed",
        ),
        (["--cache", "4", "--mse", "1"], 2, "no hidden states"),
        (["--cache-size", "much"], 2, "not a number with a unit"),
        (["--kl", "-1"], 2, "kl"),
    ],
)
def test_bad_flags_are_one_sentence(made, tmp_path, words, code, sentence):
    line = ["heal", made / "pruned", "--against", made / "dense", "--texts", made / "texts"]
    found = run(*line, "--out", tmp_path / "out", *SHORT, *words)
    assert found.exit_code == code and sentence in found.stderr, found.output
    assert found.stderr.count("Error: ") == 1 and not (tmp_path / "out").exists()


def test_a_student_larger_than_its_teacher_is_exit_code_2(made, tmp_path):
    cut = tmp_path / "cut"
    compress(made / "dense", cut, Recipe(model="t", method="dense", drop_layers=[1]))
    words = ["distill", cut, "--student", made / "dense", "--texts", made / "texts"]
    found = run(*words, "--out", tmp_path / "out", *SHORT)
    assert found.exit_code == 2 and "more than the" in found.stderr


def asked(tmp_path, defaults, text="", **flags):
    """The spec of a file with this text and these flags."""
    file = None
    if text:
        file = tmp_path / "spec.yaml"
        file.write_text(text)
    return _asked(defaults, {"spec": file, "texts": tmp_path, **flags})[0]


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    assert asked(tmp_path, {}).loss == TrainSpec().loss
    healing = asked(tmp_path, HEALING)
    assert healing.rank == HEALING["rank"] and healing.loss.cosine == HEALING["loss"]["cosine"]
    assert asked(tmp_path, HEALING, "rank: 5").rank == 5
    assert asked(tmp_path, HEALING, "rank: 5", rank=6).rank == 6
    # Who names one weight chooses all of them; who names a temperature does not.
    assert asked(tmp_path, HEALING, ce=1.0, kl=0.0).loss.cosine == 0.0
    assert asked(tmp_path, HEALING, "loss: {kl: 2.0}").loss.cosine == 0.0
    warm = asked(tmp_path, HEALING, temperature=2.0).loss
    assert (warm.temperature, warm.cosine) == (2.0, HEALING["loss"]["cosine"])
    both = asked(tmp_path, HEALING, "loss: {kl: 2.0}", mse=0.5, layers="1:2").loss
    assert (both.kl, both.mse, both.layers) == (2.0, 0.5, [(1, 2)])


def test_a_cache_leaves_out_the_hidden_states_of_the_defaults_alone(tmp_path):
    assert asked(tmp_path, HEALING, cache=8).loss.cosine == 0.0
    assert asked(tmp_path, HEALING, cache=8, cosine=1.0).loss.cosine == 1.0


def test_a_loss_that_is_no_mapping_is_refused(tmp_path):
    with pytest.raises(UsageError, match="must be a mapping"):
        asked(tmp_path, HEALING, "loss: kl")


def test_pairs_are_read():
    assert parse_pairs("all") == "all" and parse_pairs("last") == "last"
    assert parse_pairs("1:3, 2:6") == [(1, 3), (2, 6)]
    for text in ("", "1", "1:", "1:2:3", "a:b", "-1:2", "1:2,,3:4"):
        with pytest.raises(UsageError, match="pairs"):
            parse_pairs(text)
