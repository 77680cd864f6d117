"""The command line as users see it: exit codes, one sentence per error, results on stdout."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from speaking import save_model, save_texts
from typer.testing import CliRunner

import distaya_ext
import distaya_ext.cli.progress as progress_module
from distaya_ext.cli.app import app, explain
from distaya_ext.cli.compress import build_recipe
from distaya_ext.cli.inspect import grid, pattern
from distaya_ext.cli.progress import Reporter
from distaya_ext.compress import events
from distaya_ext.errors import UsageError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny", seed=1)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return save_texts(tmp_path_factory.mktemp("texts"), repeat=8)


@pytest.fixture(scope="module")
def compressed(model, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "half"
    result = distaya(
        "compress", model, "--out", out, "--sparsity", "2:4", "--bits", 3, "--group", 32,
        "--format", "dense", "--calib", texts, "--tokens", 600, "--window", 16, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    return out, json.loads(result.stdout), result.stderr


def distaya(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(code, *arguments, words=()):
    """The command fails with the code and one sentence on stderr, and prints no result."""
    result = distaya(*arguments)
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "Traceback" not in result.stderr and result.stdout == ""
    for word in words:
        assert word in line, line
    return line


def test_version_and_help():
    assert distaya("--version").stdout == f"distaya {distaya_ext.__version__}\n"
    for arguments in (["--help"], ["compress", "-h"], ["eval", "--help"], ["demo", "--help"]):
        result = distaya(*arguments)
        assert result.exit_code == 0 and "Usage" in result.stdout
    assert all(
        name in distaya("--help").stdout for name in ("compress", "eval", "generate", "inspect")
    )


def test_compress_reports_what_it_did(compressed):
    out, report, stderr = compressed
    assert report["method"] == "sparsegpt" and report["totals"]["modules"] == 14
    assert report["totals"]["sparsity"] >= 0.5
    assert report["calibration"]["tokens_per_language"] == {"en": 192, "es": 192, "ja": 192}
    assert yaml.safe_load((out / "recipe.yaml").read_text())["nm"] == "2:4"
    for word in ("tokens per character: en", "layers 2/2", "left"):
        assert word in stderr


def test_inspect_sees_pattern_and_grid(compressed):
    result = distaya("inspect", compressed[0], "--json")
    facts = json.loads(result.stdout)
    assert facts["architecture"] == "cohere" and facts["layers"] == 2
    assert len(facts["linears"]) == 14
    for linear in facts["linears"]:
        assert linear["pattern"] == "2:4" and linear["sparsity"] >= 0.5
        assert linear["bits"] == 3
    assert "2:4" in distaya("inspect", compressed[0], "--modules").stdout


def test_inspect_of_a_dense_model(model):
    facts = json.loads(distaya("inspect", model, "--json").stdout)
    assert facts["sparsity"] == 0 and facts["can_be_compressed"].startswith("yes, 14 matrices")
    assert {(x["pattern"], x["bits"]) for x in facts["linears"]} == {(None, None)}
    count = sum(p.numel() for p in _load(model).parameters())
    assert facts["parameters"] == count and facts["bytes"] == 4 * count


def _load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_inspect_refuses_with_the_reason(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    refused(3, "inspect", tmp_path, words=["gpt2"])


def test_pattern_and_grid_detection():
    torch.manual_seed(0)
    W = torch.randn(64, 256)
    assert pattern(W) is None and grid(W) is None and grid(W.bfloat16()) is None
    for n, m in ((1, 2), (2, 4), (4, 8), (5, 16)):
        groups = W.reshape(64, -1, m)
        kept = torch.zeros_like(groups).scatter_(2, groups.abs().topk(n, dim=2).indices, 1.0)
        assert pattern((groups * kept).reshape(64, 256)) == f"{n}:{m}"
    assert pattern(W * (torch.rand_like(W) < 0.5)) is None
    assert pattern(torch.zeros(4, 8)) is None
    for bits, group in ((4, 0), (3, 128), (4, 64), (2, 32)):
        parts = W.reshape(64, -1, group or 256)
        scale = parts.abs().amax(2, keepdim=True) / 2 ** (bits - 1)
        codes = (parts / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert grid((codes * scale).reshape(64, 256)) == (bits, group)


def test_eval_prints_worst_first_with_english(compressed, model, texts):
    result = distaya("eval", compressed[0], "--against", model, "--texts", texts, "--window", 16)
    assert result.exit_code == 0
    assert "worst" in result.stdout and "human evaluation" in " ".join(result.stdout.split())
    result = distaya(
        "eval", compressed[0], "--against", model, "--texts", texts, "--lines", "--json", "--quiet"
    )
    found = json.loads(result.stdout)
    losses = [row["dnll"] for row in found["languages"]]
    assert losses == sorted(losses, reverse=True) and found["mode"] == "lines"
    assert result.stderr == ""


def test_eval_gate(compressed, model, texts):
    base = [
        "eval",
        compressed[0],
        "--against",
        model,
        "--texts",
        texts,
        "--window",
        16,
        "--quiet",
        "--json",
    ]
    found = json.loads(distaya(*base).stdout)
    worst, gap = found["languages"][0], found["gap"]
    passed = distaya(
        *base,
        "--gate",
        f"max_worst_ppl_ratio={worst['ppl_ratio'] * 1.01}",
        "--gate",
        f"max_gap={gap + 0.01}",
    )
    assert passed.exit_code == 0
    failed = distaya(*base, "--gate", f"max_worst_ppl_ratio={worst['ppl_ratio'] * 0.99}")
    assert failed.exit_code == 6 and json.loads(failed.stdout)["gap"] == gap
    assert f"the worst language {worst['language']}" in failed.stderr
    refused(2, "eval", model, "--texts", texts, "--gate", "max_gap=1", words=["--against"])


def test_eval_of_one_model(model, texts):
    result = distaya("eval", model, "--texts", texts, "--window", 16, "--tokens", 96, "--quiet")
    assert result.exit_code == 0 and "PPL" in result.stdout


def test_generate_is_repeatable(model):
    greedy = [distaya("generate", model, "the cat", "--max-new-tokens", 8).stdout for _ in range(2)]
    assert greedy[0] == greedy[1] and greedy[0].startswith("the cat")
    state = torch.random.get_rng_state()
    drawn = [
        json.loads(distaya("generate", model, "猫", "--seed", seed, "--json").stdout)[
            "continuation"
        ]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(state, torch.random.get_rng_state())


def test_generate_bad_input(model):
    refused(2, "generate", model, "cat " * 200, words=["128 positions"])
    refused(2, "generate", model, "cat", "--max-new-tokens", 0, words=["max-new-tokens"])
    refused(2, "generate", model, "cat", "--seed", 1, "--temperature", 0, words=["temperature"])


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["sparsegpt", "0.5", "2:4"]),
        (["--sparsity", "1.5"], ["1.5", "[0, 1)"]),
        (["--sparsity", "3:2"], ["'3:2'"]),
        (["--sparsity", "half"], ["'half'"]),
        (["--method", "best", "--sparsity", "0.5"], ["'best'", "sparsegpt"]),
        (["--bits", "9"], ["bits", "9"]),
        (["--bits", "four"], ["--bits", "distaya compress --help"]),
        (["--bits", "4", "--group", "100"], ["group 100"]),
        (["--sparsity", "0.5", "--tokens", "5"], ["5 tokens", "256"]),
        (["--sparsity", "0.5", "--tokens", "0"], ["tokens", "0"]),
        (["--sparsity", "0.5", "--seed", "-1"], ["seed", "-1"]),
        (["--sparsity", "0.5", "--max-ram", "lots"], ["'lots'", "8GiB"]),
        (["--sparsity", "0.5"], ["--calib"]),
        (["--sparsity", "0.5", "--device", "tpu", "--method", "magnitude"], ["'tpu'"]),
        (["--sparsty", "0.5"], ["--sparsty"]),
        (["--sparsity", "0.5", "--group", "64"], ["--group", "--bits"]),
        (["--recipe", "none.yaml"], ["none.yaml"]),
    ],
)
def test_compress_bad_usage(model, tmp_path, flags, words):
    refused(2, "compress", model, "--out", tmp_path / "out", *flags, words=words)
    assert not (tmp_path / "out").exists()


def test_other_bad_usage(tmp_path):
    refused(2, "compress", "--out", tmp_path / "o", "--sparsity", "0.5", words=["model"])
    refused(2, "compress", "m", "--sparsity", "0.5", words=["--out"])
    refused(2, "eval", "m", words=["--texts"])
    refused(2, "squash", words=["squash"])
    refused(2, "eval", "m", "--texts", tmp_path, "--lines", "--tokens", 5, words=["--lines"])


def test_recipe_file_with_an_unknown_key(model, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("sparsty: 0.5\n")
    words = ["'sparsty'", "'sparsity'"]
    refused(2, "compress", model, "--out", tmp_path / "out", "--recipe", path, words=words)


def test_calibration_that_cannot_be_used(model, tmp_path):
    folder = tmp_path / "texts"
    run = ["compress", model, "--out", tmp_path / "out", "--sparsity", "0.5", "--window", "64",
           "--tokens", "4096", "--calib", folder]  # fmt: skip
    refused(3, *run, words=["texts", "does not exist"])
    folder.mkdir()
    refused(3, *run, words=["holds no"])
    (folder / "en.txt").write_text("")
    refused(3, *run, words=["en.txt", "empty"])
    (folder / "en.txt").write_text("one word")
    refused(3, *run, words=["too little text", "64 tokens", "en "])
    (folder / "en.txt").write_bytes(b"fine\nbr\xc3\n")
    refused(3, *run, words=["line 2", "not UTF-8", "byte 7"])
    assert not (tmp_path / "out").exists()


def test_existing_output_folder(model, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    flags = ["--out", tmp_path, "--method", "magnitude", "--sparsity", "0.5"]
    result = distaya("compress", model, *flags)
    assert result.exit_code in (2, 3) and result.stderr.count("Error: ") == 1
    assert (tmp_path / "kept.txt").read_text() == "mine"


def test_models_that_are_none(texts, tmp_path):
    for command in (["eval", "--texts", texts], ["inspect"]):
        refused(3, command[0], tmp_path / "none", *command[1:], words=["none"])
    (tmp_path / "empty").mkdir()
    refused(3, "eval", tmp_path / "empty", "--texts", texts, words=["empty"])
    refused(3, "generate", tmp_path / "empty", "hello", words=["empty"])


def test_debug_shows_the_traceback(tmp_path):
    result = distaya("inspect", tmp_path / "none", "--debug")
    assert result.exit_code == 3 and "Traceback" in result.stderr and "Error: " in result.stderr


def test_faults_and_resources_have_their_codes():
    assert explain(KeyError("x"))[1] == 1 and "--debug" in explain(KeyError("x"))[0]
    assert explain(MemoryError())[1] == 5
    assert explain(OSError(28, "No space left on device", "f")) == (
        "No space left on device (f)",
        5,
    )
    assert explain(PermissionError(13, "Permission denied", "f"))[1] == 3


def test_flags_win_over_the_recipe_file(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: a\nnm: 2:4\ncalibration: {path: t, tokens: 4096, window: 64}\n")
    flags = {"path": None, "tokens": 8192, "window": None, "seed": None}
    got = build_recipe(path, sparsity="0.3", bits=None, calibration=flags)
    assert (got.sparsity, got.nm) == (0.3, None)
    assert (got.calibration.tokens, got.calibration.window, got.calibration.path) == (8192, 64, "t")
    assert build_recipe(path, sparsity=None, calibration={}).nm == "2:4"
    only_bits = build_recipe(None, model="m", sparsity=None, bits=4, calibration={})
    assert only_bits.method == "gptq"
    path.write_text("model: a\ncalibration: [1]\n")
    with pytest.raises(UsageError, match="calibration must be a mapping, not list"):
        build_recipe(path, calibration={"tokens": 9})


def test_heartbeats_tell_how_long_is_left(capsys, monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    with Reporter() as reporter:
        reporter.on_event(events.Notice("few tokens"))
        for layer in range(2):
            reporter.on_event(events.LayerStart(layer, 2))
            stage = events.StageDone(layer, ("mlp.down_proj",), 1.0, 0.25, 0.5, 0, 0, 1.0)
            reporter.on_event(stage)
            reporter.on_event(events.LayerDone(layer, 2, 2.0))
        reporter.on_event(events.Saved("out", 2, 3 << 20))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "note: few tokens"
    layers = [line for line in lines if line.startswith("layers")]
    assert len(layers) == 2 and "2.50e-01 (down)" in layers[0]
    assert "0 s left" not in layers[0] and layers[1].endswith(" 0 s left")
    assert lines[-1] == "2 shards, 3.0 MiB"


def test_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Reporter() as reporter:
        reporter.on_progress(10, 40, "en")
        (task,) = reporter._bar.tasks
        assert (task.completed, task.total) == (10, 40) and "en" in task.description
    with Reporter(quiet=True) as reporter:
        reporter.on_progress(10, 40, "en")
        assert reporter._bar is None


def test_doctor(monkeypatch):
    report = {"cpu": {"threads": "2", "instruction set": "avx2"}, "gpu": {"status": "none"}}
    monkeypatch.setattr("distaya_ext.doctor.report", lambda: report)
    assert json.loads(distaya("doctor", "--json").stdout) == report
    printed = distaya("doctor").stdout
    assert all(word in printed for word in ("cpu", "instruction set", "avx2", "gpu"))


def _start(*arguments):
    code = "from distaya_ext.cli.app import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_as_a_program_and_interrupted(model, texts, tmp_path):
    """--help brings in no transformers; Ctrl-C ends with 130 and one sentence."""
    code = (
        "import sys\n"
        "try:\n from distaya_ext.cli.app import main; sys.argv = ['distaya', '--help']; main()\n"
        "except SystemExit: pass\n"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
    big = save_texts(tmp_path / "big", repeat=1000)
    run = _start("eval", model, "--texts", big, "--window", 64)
    first = run.stderr.readline()  # a heartbeat: the work has begun
    assert "tokens" in first
    time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert "Interrupted" in err and "Traceback" not in err


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_the_middle_nothing_is_left(model, tmp_path, number, code):
    """Neither at the output, nor beside it, nor the folders above it that were made for it; when a
    layer was done before the signal came, that is kept, and said.
    """
    texts = save_texts(tmp_path / "texts", repeat=3000)
    flags = ["--sparsity", "0.5", "--calib", texts, "--tokens", 120_000, "--window", 16]
    run = _start("compress", model, "--out", tmp_path / "deep" / "out", *flags)
    lines = iter(run.stderr.readline, "")
    assert any(line.startswith("replay of") for line in lines)
    inside = sorted(path.name for path in (tmp_path / "deep").iterdir())
    assert inside == [".out.compress"]
    run.send_signal(number)
    out, err = run.communicate(timeout=60)
    assert run.returncode == code, err
    assert out == "" and "Traceback" not in err
    left = [path.name for path in (tmp_path / "deep").glob("*")]
    if "kept in .out.compress" in err:
        assert left == [".out.compress"] and not list(tmp_path.glob("deep/.out.compress/scratch"))
    else:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["texts"]


def test_calibration_that_is_not_used_is_told(model, texts, tmp_path):
    flags = ["--out", tmp_path / "out", "--method", "magnitude", "--sparsity", "0.5"]
    result = distaya("compress", model, *flags, "--calib", texts)
    assert result.exit_code == 0 and "note: method magnitude learns nothing" in result.stderr
    assert "note" not in distaya("compress", model, *flags, "--overwrite").stderr
