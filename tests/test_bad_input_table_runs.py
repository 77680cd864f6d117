"""The table of bad inputs, continued: numbers gone bad, and runs that are stopped or disturbed."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import tiny
import torch
from damage import WEIGHTS, edit_tensors
from safetensors import SafetensorError
from safetensors.torch import load_file
from speaking import save_model, save_texts
from strangers import INPUT, USAGE, compress, contents, distaya, one_sentence
from transformers import CohereConfig

import distaya_ext
from distaya_ext.checkpoint import writer
from distaya_ext.compress import keep
from distaya_ext.errors import InputError
from distaya_ext.ops import obs
from distaya_ext.quant import Quant

RESOURCE, NUMERICS = 5, 4


# ---- numbers ----


@pytest.fixture
def overflowing(tmp_path):
    """A model that overflows on token 5 only, and windows without it."""
    config = CohereConfig(**{**tiny.FAMILIES["cohere"].to_dict(), "tie_word_embeddings": False})
    source = tiny.make(tmp_path / "source", config)
    edit_tensors(lambda t: t["model.embed_tokens.weight"][5].fill_(3e38))(source)
    calibration = tiny.windows(8)
    calibration.ids[calibration.ids == 5] = 6
    return source, calibration


def test_row_a_window_that_overflows_is_skipped_and_counted(overflowing, tmp_path):
    """Told with its language and its number; the statistics of all other windows stay clean."""
    source, calibration = overflowing
    calibration.ids[5, 3] = 5
    report = distaya_ext.compress(source, tmp_path / "out", tiny.recipe(), calibration)
    told = json.loads((tmp_path / "out" / "results.json").read_text())["fallbacks"]
    assert told["kinds"]["skipped_windows"] == 1
    (each,) = [e for e in told["modules"] if e["kind"] == "skipped_windows"]
    assert "window 3 of 4 in language 'fr'" in each["what"] and "layers.0" in each["module"]
    weights = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.isfinite(t).all() for t in weights.values()) and report.sparsity == 0.5


def test_row_too_many_windows_that_overflow_end_the_run(overflowing, tmp_path):
    """Above one in a hundred (or one): refused, with layer, language, number and count."""
    source, calibration = overflowing
    calibration.ids[5:8:2, 3] = 5
    with pytest.raises(InputError) as caught:
        distaya_ext.compress(source, tmp_path / "out", tiny.recipe(), calibration)
    for word in ("model.layers.0", "of 4 in language 'fr'", "on 2 of 8 calibration windows"):
        assert word in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_row_dead_columns_keep_their_rounded_value_and_are_reported(tmp_path):
    """Inputs that the texts never use may be features of a language they lack: not zeroed."""
    dead = [1, 4, 30]
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"])
    norm, name = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj"
    edit_tensors(lambda t: t[norm].index_fill_(0, torch.tensor(dead), 0))(source)
    W = load_file(source / WEIGHTS)[f"{name}.weight"]
    recipe = tiny.recipe("gptq", bits=4, group=0, quality="plain", format="dense")
    distaya_ext.compress(source, tmp_path / "out", recipe, tiny.windows())
    got = load_file(tmp_path / "out" / WEIGHTS)[f"{name}.weight"][:, dead]
    rounded, *_ = obs.quantize(W, Quant(4, 0, symmetric=False))
    assert torch.equal(got, rounded[:, dead]) and bool(got.any())
    told = json.loads((tmp_path / "out" / "results.json").read_text())["fallbacks"]["modules"]
    assert {"module": name, "kind": "rtn_columns", "count": 3} in [
        {key: each[key] for key in ("module", "kind", "count")} for each in told
    ]


def test_row_hessians_of_rank_0_end_a_strict_run(place):
    edit_tensors(lambda t: [t[n].zero_() for n in t if "norm" in n])(place / "model")
    before = contents(place)
    one_sentence(compress(place, "--strict"), NUMERICS, "degraded", "rank_zero", "q_proj")
    assert contents(place) == before


# ---- runs that are stopped or disturbed ----

WAITING = """
import sys
from distaya_ext.cli.app import main
from distaya_ext.compress.keep import Keeper
save = Keeper.save
def waits(self, layer):
    save(self, layer)
    print("here", flush=True)
    sys.stdin.read()
Keeper.save = waits
sys.argv = ["distaya", *sys.argv[1:]]
main()
"""


@pytest.fixture(scope="module")
def disturbed(healthy, tmp_path_factory):
    """A run that was killed behind its first layer, and what a second one was told meanwhile."""
    place = shutil.copytree(healthy, tmp_path_factory.mktemp("disturbed") / "place")
    flags = ["--sparsity", "0.5", "--calib", place / "texts", "--tokens", 480, "--window", 16]
    command = ["compress", place / "model", "--out", place / "out", *flags, "--quiet"]
    child = subprocess.Popen(
        [sys.executable, "-c", WAITING, *map(str, command)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    try:
        assert child.stdout.readline() == b"here\n"
        second = compress(place)
    finally:
        child.kill()
        assert child.wait() == -signal.SIGKILL
    return place, second, child.pid


def test_row_two_runs_into_the_same_folder(disturbed):
    """The second is refused and told the process of the first, which does not notice."""
    _, second, number = disturbed
    one_sentence(second, USAGE, "another run", f"process {number}", "wait for it")


def test_row_a_killed_run_leaves_no_output_and_goes_on(disturbed, healthy, tmp_path):
    """The same command begins behind the last layer and ends with the same bytes."""
    place = shutil.copytree(disturbed[0], tmp_path / "place")
    assert not (place / "out").exists()
    result = compress(place)
    assert result.exit_code == 0 and "1 of 2" in result.stderr, result.stderr
    assert compress(healthy, "--out", tmp_path / "whole").exit_code == 0
    for name in (WEIGHTS, "config.json", "recipe.yaml"):
        one, other = (
            (folder / name).read_bytes() for folder in (place / "out", tmp_path / "whole")
        )
        assert name == "recipe.yaml" or one == other, name
    assert {p.name for p in place.iterdir()} == {"model", "texts", "out"}


def kept(place):
    """Everything but the number in the lock."""
    return {p: data for p, data in contents(place).items() if p.name not in ("lock", "scratch")}


CHANGES = {
    "recipe": (lambda place: None, ["--sparsity", "0.6"], "sparsity"),
    "seed": (lambda place: None, ["--seed", "5"], "seed"),
    "texts": (lambda place: save_texts(place / "texts", repeat=9), [], "texts"),
    "model": (lambda place: save_model(place / "model", seed=2), [], "model"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_row_a_changed_run_is_refused_with_the_difference(disturbed, tmp_path, case):
    change, flags, word = CHANGES[case]
    place = shutil.copytree(disturbed[0], tmp_path / "place")
    change(place)
    before = kept(place)
    one_sentence(compress(place, *flags), USAGE, "holds a run that was stopped", word, "--restart")
    assert kept(place) == before
    assert compress(place, *flags, "--restart").exit_code == 0


def test_row_ctrl_c_ends_with_130_and_keeps_what_is_done(place, monkeypatch):
    """A real signal behind the first layer; inside a kernel: test_interrupt.py."""
    real = keep.Keeper.save

    def save(self, layer):
        real(self, layer)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(keep.Keeper, "save", save)
        result = compress(place)
    assert result.exit_code == 130 and result.stdout == "", result.stderr
    assert "1 of 2 layers" in result.stderr and "goes on" in result.stderr
    assert not (place / "out").exists()
    again = compress(place)
    assert again.exit_code == 0 and "1 of 2" in again.stderr, again.stderr


def test_row_a_full_disk_has_an_exit_code_and_loses_nothing(place, monkeypatch):
    """Met while the second layer is kept: the first stays, and the same command goes on from it."""
    real, calls = writer.save_file, []

    def full(tensors, path, *rest, **more):
        calls.append(path)
        if len(calls) > 1:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, path, *rest, **more)

    with monkeypatch.context() as broken:
        broken.setattr(writer, "save_file", full)
        one_sentence(compress(place), RESOURCE, "No space left", "1 of 2 layers", "goes on")
    assert not (place / "out").exists()
    result = compress(place)
    assert result.exit_code == 0 and "1 of 2" in result.stderr, result.stderr


def test_row_work_that_another_user_left_is_not_believed(disturbed, tmp_path, monkeypatch):
    """Where everyone may write, somebody else's journal could name any file of ours."""
    place = shutil.copytree(disturbed[0], tmp_path / "place")
    place.chmod(0o777)
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    before = contents(place)
    one_sentence(compress(place), INPUT, ".out.compress", "another user")
    assert contents(place) == before


@pytest.mark.parametrize("what", ["config.json", "tokenizer.json", "model.safetensors"])
def test_row_a_pipe_is_not_waited_on(place, what):
    (place / "model" / what).unlink()
    os.mkfifo(place / "model" / what)
    one_sentence(compress(place), INPUT, "model")
    result = distaya("verify", place / "model")
    assert result.exit_code not in (0, 1), result.stderr
