"""Tokens per second of whole models: `distaya bench model`, and what `distaya generate` says."""

import json
import math

import pytest
import torch
from speaking import save_model
from torch import nn
from typer.testing import CliRunner

from distaya_ext.cli.app import app
from distaya_ext.errors import InputError
from distaya_ext.measure import clock, model, report, speed
from distaya_ext.runtime import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny", seed=1)


def distaya(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def parameter_bytes(folder):
    return sum(p.numel() * p.element_size() for p in load(folder).parameters())


def test_rates_on_a_stubbed_clock(folder, monkeypatch):
    """Prefill of the first model takes 2 s and of the second 4; decoding 1 s and 8."""
    walls = iter([2.0, 4.0, 1.0, 8.0])

    def sample(run, inputs, threads, kept=None):
        run(*inputs)
        wall = next(walls)
        return clock.Sample(wall, wall, 0.0, threads)

    monkeypatch.setattr(clock, "sample", sample)
    setting = model.Setting(prompt=6, new=4, runs=1, threads=1)
    result = model.measure(folder, folder, setting)
    ours, dense = result.rows
    assert (ours.prefill_rate, dense.prefill_rate) == (3.0, 1.5)
    assert (ours.decode_rate, dense.decode_rate) == (4.0, 0.5)
    assert ours.decode_seconds == 0.25
    assert result.ratios == {"prefill": 2.0, "decode": 8.0, "bytes": 1.0}
    assert (ours.name, dense.name) == (str(folder), f"{folder} again")
    assert ours.weights == "float32" and ours.nbytes >= parameter_bytes(folder)


def test_bench_model_prints_both(folder):
    flags = ["--prompt", 8, "--new", 2, "--runs", 1, "--threads", 1]
    result = distaya("bench", "model", folder, "--against", folder, *flags, "--json", "--quiet")
    assert result.exit_code == 0 and result.stderr == ""
    body = json.loads(result.stdout)
    assert body["bench"] == "model" and len(body["rows"]) == 2
    for row in body["rows"]:
        assert (row["prompt"], row["new"], row["threads"]) == (8, 2, 1)
        rates = [row[k] for k in ("prefill_rate", "decode_rate", "nbytes")]
        assert all(math.isfinite(rate) and rate > 0 for rate in rates)
    table = distaya("bench", "model", folder, *flags).stdout
    assert "decode tokens/s" in table and "first against second" not in table


def test_bench_model_refuses_in_one_sentence(folder, tmp_path):
    result = distaya("bench", "model", folder, "--prompt", 120, "--new", 9)
    assert result.exit_code == 2 and "exceed the 128 positions" in result.stderr
    result = distaya("bench", "model", tmp_path / "none")
    assert result.exit_code == 3 and result.stderr.count("Error: ") == 1
    result = distaya("bench", "model", folder, "--against", tmp_path / "none")
    assert result.exit_code == 3 and "none" in result.stderr


def test_a_model_without_finite_logits_is_refused(folder):
    broken = load(folder)
    nn.init.constant_(broken.model.norm.weight, float("nan"))
    with pytest.raises(InputError, match="broken gives logits that are not finite"):
        model.compare({"broken": broken}, model.Setting(prompt=4, new=1, runs=1))


def test_decode_goes_on_from_the_prompt(folder):
    """What is timed is generation: the same tokens as transformers' own greedy generate()."""
    network = load(folder)
    ids = torch.tensor([[1, 20, 30]])
    runner = model._Runner(network, ids, new=5)
    with torch.inference_mode():
        last = runner.decode(*runner.prefill())
        out = network.generate(
            ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None
        )
    assert last.item() == out[0, -1].item()


# ---- generate ----


def test_stopwatch_splits_prefill_from_decode(monkeypatch):
    times = iter([10.0, 12.0, 12.5, 13.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(times))
    watch = speed.Stopwatch()
    assert watch.speed() == speed.Speed(0, 0, 0.0, 0.0)
    assert watch.speed().prefill_rate is None and watch.speed().decode_rate is None
    watch.put(torch.zeros(1, 6))
    watch.put(torch.zeros(1))
    assert watch.speed().decode_rate is None and watch.speed().prefill_rate == 3.0
    for _ in range(2):
        watch.put(torch.zeros(1))
    watch.end()
    assert watch.speed() == speed.Speed(prompt=6, new=3, prefill=2.0, decode=1.0)
    assert watch.speed().decode_rate == 2.0


def test_generate_tells_its_speed_on_stderr(folder):
    result = distaya("generate", folder, "the cat", "--max-new-tokens", 4)
    assert result.exit_code == 0 and "tokens/s" not in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if "tokens/s" in line]
    assert line.startswith("prompt of ") and line.endswith(" of weights in memory")
    assert "4 new at " in line
    found = json.loads(
        distaya("generate", folder, "the cat", "--max-new-tokens", 4, "--json").stdout
    )
    assert found["new_tokens"] == 4 and found["prompt_tokens"] >= 2
    assert found["decode_tokens_per_second"] > 0 < found["prefill_tokens_per_second"]
    assert found["resident_bytes"] >= parameter_bytes(folder)
    one = json.loads(distaya("generate", folder, "the cat", "--max-new-tokens", 1, "--json").stdout)
    assert one["decode_tokens_per_second"] is None and "against" not in one
    both = distaya("generate", folder, "the cat", "--max-new-tokens", 2, "--against", folder)
    assert both.stdout.count("the cat") == 2 and both.stderr.count("tokens/s") == 4
    two = json.loads(distaya("generate", folder, "the cat", "--json", "--against", folder).stdout)
    assert two["against"]["continuation"] == two["continuation"]
    assert two["dense_bytes"] == two["against"]["resident_bytes"]


def test_the_table_shows_graphs_only_where_they_were_measured():
    def row(name, graph):
        return model.ModelRow(name, "int4", 1, 1 << 20, 4, 1.0, 4.0, 2, 0.5, 2.0, False, graph)

    both = model.ModelResult([row("a", 30.0), row("b", 10.0)])
    assert both.ratios["graph"] == 3.0
    for result, cells in [
        (both, ["30.0", "10.0", "3.00x"]),
        (model.ModelResult([row("a", 30.0), row("b", None)]), ["30.0", "", ""]),
    ]:
        (column,) = [c for c in report.model_table(result).columns if "graph" in str(c.header)]
        assert [str(cell) for cell in column.cells] == cells
    plain = report.model_table(model.ModelResult([row("a", None)]))
    assert not any("graph" in str(c.header) for c in plain.columns)
