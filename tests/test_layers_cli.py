"""`distaya layers` as users see it: tables, rankings, commands that work, a picture, sentences."""

import json
import shlex
import struct
import sys
from importlib.resources import files

import loud
import numpy as np
import pytest
import tiny
from speaking import save_texts, tokenizer
from typer.testing import CliRunner

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.cli.app import app
from distaya_ext.cli.layers import advice
from distaya_ext.influence.spec import SCORES

SMALL = ("--tokens", 192, "--window", 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Four layers: three slide, the fourth sees everything."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.make(folder, loud.config("cohere2", 4, vocab_size=300))
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return save_texts(tmp_path_factory.mktemp("texts"), repeat=12)


def distaya(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(code, *arguments, words=()):
    """The command fails with the code and one sentence, and prints no result."""
    result = distaya("layers", *arguments)
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "Traceback" not in result.stderr and result.stdout == ""
    for word in words:
        assert word in line, line


def test_tables_rankings_and_a_command_that_works(model, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = distaya("layers", model, "--texts", texts, *SMALL, "--drop", "50%", "--parts")
    assert result.exit_code == 0, result.stderr
    out = result.stdout
    for word in ("sliding", "full", "attention", "MLP", "kl, greedy", "ppl, greedy", "delta NLL"):
        assert word in out, word
    for score in SCORES:
        assert f"{score}, least first: " in out
    assert "2 consecutive layers of least angular distance begin at" in out
    assert "forwards " in result.stderr and "192 tokens" in result.stderr
    command = out.strip().splitlines()[-1]
    dropped = command.split("--drop-layers ")[1].split()[0]
    assert f"recommended: drop {dropped.replace(',', ', ')}" in out
    words = shlex.split(command)
    assert words[0] == "distaya" and words[2] == str(model)
    done = distaya(*words[1:], "--quiet")
    assert done.exit_code == 0, done.stderr
    written = open_checkpoint(tmp_path / "tiny-2-layers")
    assert written.config.num_hidden_layers == 2


def test_json_says_everything(model, texts):
    result = distaya("layers", model, "--texts", texts, *SMALL, "--json", "--quiet", "--seed", 1)
    assert result.exit_code == 0 and result.stderr == "", result.stderr
    found = json.loads(result.stdout)
    assert found["layers"] == 4 and found["candidates"] == [f"layer {i}" for i in range(4)]
    assert found["windows"] == {"en": 2, "es": 2, "ja": 2} and found["window"] == 32
    assert set(found["scores"]) == {*SCORES, "angular last"}
    for score in found["scores"].values():
        for mean, by in zip(score["mean"], score["languages"], strict=True):
            assert mean == pytest.approx(np.mean(list(by.values())))
    for score, order in found["rankings"].items():
        assert order == sorted(range(4), key=found["scores"][score]["mean"].__getitem__)
    assert [choice["score"] for choice in found["choices"]] == list(SCORES)
    least = min(found["choices"], key=lambda choice: choice["loss"]["kl"])
    assert found["recommended"] == least["dropped"] and len(least["dropped"]) == 1
    assert found["command"].endswith(f"--drop-layers {least['dropped'][0]}, --out tiny-3-layers")
    again = distaya("layers", model, "--texts", texts, *SMALL, "--json", "--quiet", "--seed", 1)
    assert again.stdout == result.stdout
    other = distaya("layers", model, "--texts", texts, *SMALL, "--json", "--quiet", "--seed", 2)
    assert json.loads(other.stdout)["scores"] != found["scores"]


def test_only_what_is_asked_for(model, texts):
    more = ("--scores", "l2, bi", "--drop", 2, "--protect", "0,-1", "--json", "--quiet")
    found = json.loads(distaya("layers", model, "--texts", texts, *SMALL, *more).stdout)
    assert set(found["scores"]) == {"bi", "l2"} and "nll" not in found and "runs" not in found
    assert found["recommended"] == [1, 2] and not found["choices"][0]["greedy"]
    assert any("layers that stay" in notice for notice in found["choices"][0]["notices"])
    shown = distaya("layers", model, "--texts", texts, *SMALL, *more[:-2])
    assert shown.exit_code == 0 and "note: full attention stood at every" in shown.stdout
    once = ("--scores", "kl", "--drop", 2, "--one-shot", "--json", "--quiet")
    found = json.loads(distaya("layers", model, "--texts", texts, *SMALL, *once).stdout)
    assert len(found["choices"][0]["rounds"]) == 1 and not found["choices"][0]["greedy"]
    assert found["recommended"] == sorted(found["rankings"]["kl"][:2])


def test_a_picture(model, texts, tmp_path):
    path = tmp_path / "layers.png"
    more = ("--plot", path, "--parts", "--scores", "bi,ppl,kl", "--quiet")
    result = distaya("layers", model, "--texts", texts, *SMALL, *more)
    assert result.exit_code == 0 and result.stdout.strip().endswith(str(path)), result.stderr
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and width > 800 and height > 400


@pytest.mark.parametrize(
    "code, arguments, words",
    [
        (2, ["--drop", "0"], ["--drop 0 drops no layer"]),
        (2, ["--drop", "0%"], ["between 0% and 100%"]),
        (2, ["--drop", "100%"], ["between 0% and 100%"]),
        (2, ["--drop", "abc"], ["--drop 'abc'", "25%"]),
        (2, ["--drop", "1,2"], ["how many layers", "not '1,2'"]),
        (2, ["--drop", "4"], ["4 layers", "has 4"]),
        (2, ["--drop", "10%"], ["10% of 4 layers"]),
        (2, ["--protect", "7"], ["layer 7", "has 4"]),
        (2, ["--protect", "a"], ["--protect", "'a'"]),
        (2, ["--scores", "taylor"], ["'taylor' is none of"]),
        (2, ["--scores", ","], ["no score"]),
        (2, ["--plot", "absent/x.png"], ["--plot", "folder that exists"]),
        (2, ["--plot", "x.pdf"], [".png"]),
        (2, ["--device", "tpu"], ["'tpu'"]),
        (2, ["--max-ram", "1MiB"], ["max_ram allows"]),
        (3, ["--tokens", "40"], ["40 tokens are fewer than one window"]),
        (2, ["--tokens", "4096", "--window", "128"], ["128 tokens exceed the model's 64"]),
    ],
)
def test_what_cannot_be_done_is_one_sentence(model, texts, code, arguments, words):
    refused(code, model, "--texts", texts, *SMALL, *arguments, words=words)


def test_texts_and_models_that_are_not_there(model, texts, tmp_path):
    refused(3, model, "--texts", tmp_path / "none", *SMALL, words=["does not exist"])
    (tmp_path / "empty").mkdir()
    refused(3, model, "--texts", tmp_path / "empty", *SMALL, words=["holds no"])
    refused(2, model, words=["--texts"])
    refused(3, tmp_path / "model", "--texts", texts, *SMALL, words=["neither an existing folder"])


def test_without_matplotlib_it_says_what_to_install(model, texts, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(
        2, model, "--texts", texts, "--plot", "x.png", words=["pip install 'distaya-ext[train]'"]
    )


def test_a_single_layer_is_written_as_a_list():
    assert advice("owner/name", [3], 8) == (
        "distaya compress owner/name --drop-layers 3, --out name-7-layers"
    )
    assert "'my model'" in advice("my model", [0, 1], 4)


def test_nano_aya(tmp_path):
    """The bundled model: layer 0 is never free to go, and greedy choices beat the others."""
    assets = files("distaya_ext") / "assets"
    result = distaya(
        "layers", assets / "nano-aya", "--texts", assets / "texts" / "calibration", "--drop", 2,
        "--tokens", 23 * 32, "--window", 32, "--json", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found["windows"]) == 23
    for score in SCORES:
        assert found["rankings"][score][-1] == 0
        assert set(found["rankings"][score][:2]) <= {1, 2, 4}
    loss = {choice["score"]: choice["loss"]["kl"] for choice in found["choices"]}
    assert loss["kl"] < 0.85 * loss["bi"] and loss["kl"] < 0.85 * loss["angular"]
    assert 0 not in found["recommended"] and 7 not in found["recommended"]
