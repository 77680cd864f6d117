"""The bench of a whole model on a GPU, tried on the CPU: what it tells, and when it stops."""

import json
import time

import pytest
import torch

from bench import gpu_whole, whole_model
from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.compress import walk


def told(path):
    return [json.loads(line)["row"] for line in path.read_text().splitlines()]


def test_a_quick_run_tells_everything(tmp_path):
    into = tmp_path / "rows"
    assert gpu_whole.main(["--into", str(into), "--device", "cpu", "--quick"]) == 0
    rows = told(into)
    at = [row["name"].split(",")[0] for row in rows].index("textbook PyTorch")
    inside = {"forward", "hessian", "factor", "sweep", "pack", "other", "other in a layer"}
    more = {"dense forward", "cross moment", "aim", "refit"}
    for quality, (whole, *phases), asked in (
        ("plain", rows[:at], inside),
        ("default", rows[at + 1 :], inside | more),
    ):
        assert whole["name"] == f"aya-8b, 2 layers, 256 tokens, 2:4 int4, quality {quality}"
        assert whole["quality"] == quality
        assert whole["layers"] == 2 and whole["seconds"] > 0 and not whole["whole"]
        assert {
            row["name"].removeprefix(f"of these, quality {quality}: ") for row in phases
        } == asked
        assert sum(row["seconds"] for row in phases) == pytest.approx(whole["seconds"], rel=0.05)
    textbook = rows[at]
    assert textbook["matrices"] == "q, k, v, o, gate, up, down"
    assert textbook["extrapolated_to_2_layers_seconds"] == 2 * textbook["seconds"]
    # Nothing of the package stays replaced.
    assert walk.LayerWalk._run.__qualname__ == "LayerWalk._run"


def test_a_run_without_time_stops_after_a_layer_and_says_so(tmp_path):
    into = tmp_path / "rows"
    words = ["--into", str(into), "--device", "cpu", "--quick", "--limit", "0.001"]
    assert gpu_whole.main(words) == 0
    (whole, *_, textbook, default) = told(into)
    assert default["layers"] == 0 and default["note"] == "no time was left"
    assert whole["layers"] == 1 and not whole["whole"]
    assert whole["name"].endswith("plain, STOPPED after 1 of 2 layers: no time left")
    assert textbook["note"] == "no time was left for q, k, v, o, gate, up, down"
    assert not any("extrapolated" in key for key in textbook)
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_phases_count_what_is_inside_them_once(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))

    class Work:
        def outer(self):
            self.inner()

        def inner(self):
            pass

    with gpu_whole.Phases(cuda=False) as phases:
        phases._wrap(Work, "outer", "forward")
        phases._wrap(Work, "inner", "hessian")
        Work().outer()
    assert phases.seconds() == {"forward": 2.0, "other": 2.0, "hessian": 1.0}


def test_only_the_model_and_tokens_asked_for_count_as_whole():
    full = ["--into", "x"]
    assert gpu_whole.arguments(full).full
    for other in (["--layers", "2"], ["--samples", "64"], ["--quick"]):
        assert not gpu_whole.arguments([*full, *other]).full
    for wrong in (["--device", "cpu"], ["--layers", "0"], ["--tokens", "1"]):
        with pytest.raises(SystemExit):
            gpu_whole.arguments([*full, *wrong])


def test_sizes_of_the_model():
    found = gpu_whole.model_bytes(gpu_whole.MODELS["aya-8b"], 32)
    assert 16.0e9 < found < 16.1e9
    assert gpu_whole.place(1 << 60) is None


def test_copied_layers_are_a_model(tmp_path):
    whole_model.make(tmp_path, gpu_whole.QUICK, 1)
    gpu_whole.repeat_layer(tmp_path, 12)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.num_hidden_layers == 12
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1, 11)]
    first, *others = checkpoint.read(names).values()
    assert first.abs().sum() > 0 and all(torch.equal(first, other) for other in others)


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_whole.main(["--into", str(tmp_path / "rows")]) == 3
    assert "no GPU" in capsys.readouterr().err and not (tmp_path / "rows").exists()
