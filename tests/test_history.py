"""The history of runs: lines that survive, what is comparable, what became worse."""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from speaking import save_model, save_texts
from typer.testing import CliRunner

from distaya_ext import history
from distaya_ext.cli import remember
from distaya_ext.cli.app import app


@pytest.fixture
def kept(tmp_path, monkeypatch):
    file = tmp_path / "state" / "runs.jsonl"
    monkeypatch.setenv("DISTAYA_HISTORY", str(file))
    return file


def test_records_come_back_in_order(kept):
    assert history.read() == []
    for number in range(3):
        assert history.add({"command": "eval", "bytes": number, "languages": {"日": [1.5]}}) is None
    found = history.read()
    assert [r["bytes"] for r in found] == [0, 1, 2] and found[0]["languages"] == {"日": [1.5]}
    assert all(r["time"].endswith("+00:00") for r in found)
    assert kept.stat().st_mode & 0o077 == 0


def test_a_torn_line_costs_only_itself(kept):
    history.add({"command": "eval", "bytes": 1})
    with open(kept, "ab") as file:
        file.write(b'{"time": "x", "command": "ev')
    assert history.past().skipped == 1
    history.add({"command": "eval", "bytes": 2})
    with open(kept, "ab") as file:
        file.write(b'\n[1]\n{"time": 3}\n{"time": "x", "command": "y", "bytes": NaN}\n\xff\n')
        file.write(b"[" * 5000 + b"\n" + b"x" * (1 << 19) + b"\n")
    found = history.past()
    assert [r["bytes"] for r in found.records] == [1, 2] and found.skipped >= 7
    history.add({"command": "eval", "bytes": 3})
    assert history.read()[-1]["bytes"] == 3


def test_runs_side_by_side_do_not_mix_their_lines(kept):
    def run(who):
        for number in range(20):
            record = {"command": "eval", "who": who, "number": number, "x": "y" * 3000}
            assert history.add(record) is None

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(8)))
    found = history.past()
    assert found.skipped == 0 and len(found.records) == 160
    for who in range(8):
        assert [r["number"] for r in found.records if r["who"] == who] == list(range(20))


def test_the_file_stays_small(kept, monkeypatch):
    monkeypatch.setattr(history, "_MOST", 2000)
    for number in range(50):
        history.add({"command": "eval", "number": number, "x": "y" * 100})
    sizes = [p.stat().st_size for p in kept.parent.iterdir()]
    assert len(sizes) == 2 and max(sizes) <= 2000
    numbers = [r["number"] for r in history.read()]
    assert numbers == list(range(numbers[0], 50)) and len(numbers) > 10
    monkeypatch.setattr(history, "_LONGEST", 100)
    assert "bytes" in history.add({"command": "eval", "x": "y" * 100})


def test_where_it_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTAYA_HISTORY", "off")
    assert history.file() is None and history.add({"command": "eval"}) is None
    assert history.read() == []
    monkeypatch.delenv("DISTAYA_HISTORY")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert history.file() == tmp_path / "xdg" / "distaya" / "history.jsonl"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history.file() == tmp_path / ".local" / "state" / "distaya" / "history.jsonl"


def test_a_history_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DISTAYA_HISTORY", str(tmp_path / "file" / "runs.jsonl"))
    sentence = history.add({"command": "eval"})
    assert sentence.startswith("this run is not in the history: ") and "\n" not in sentence
    monkeypatch.setenv("DISTAYA_HISTORY", str(tmp_path / "ok.jsonl"))
    assert "not in the history" in history.add({"command": object()})
    assert history.add({"command": "eval", "nll": math.inf, "pair": (1, math.nan)}) is None
    assert history.read()[0]["nll"] is None and history.read()[0]["pair"] == [1, None]


def test_a_lock_that_another_run_holds(kept, monkeypatch):
    import fcntl

    history.add({"command": "eval"})
    monkeypatch.setattr(history, "_PATIENCE", 0.1)
    handle = os.open(kept.parent, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert "another run" in history.add({"command": "eval"})
    finally:
        os.close(handle)
    assert history.add({"command": "eval"}) is None and len(history.read()) == 2


def run(number, command="eval", model="a@1", base="b@2", texts="t", **more):
    return {"command": command, "model": model, "base": base, "texts": texts, "n": number, **more}


def test_only_runs_alike_are_compared():
    now = run(9, model="other@5")
    records = [
        run(0), run(1, command="bench model"), run(2, base="b@3"), run(3, texts="u"),
        run(4, base="renamed@2"), run(5, setting="lines"), run(6, model="x@2", base=None), now,
        run(10),
    ]  # fmt: skip
    assert [r["n"] for r in history.earlier(records, now)] == [0, 4, 6]
    assert [r["n"] for r in history.earlier(records[:3], now)] == [0]  # not yet among them
    assert history.earlier([], now) == []


def with_language(dnll, low=None, high=None, **more):
    interval = None if low is None else [low, high]
    return {"languages": {"sw": {"dnll": dnll, "dnll_interval": interval}}, **more}


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        ({"bytes": 1000}, {"bytes": 1100}, {"bytes": True}),
        ({"bytes": 1100}, {"bytes": 1000}, {"bytes": False}),
        ({"bytes": 100_000}, {"bytes": 100_050}, {}),
        ({"tokens_per_second": 100.0}, {"tokens_per_second": 80.0}, {"tokens per second": True}),
        ({"tokens_per_second": 80.0}, {"tokens_per_second": 100.0}, {"tokens per second": False}),
        ({"tokens_per_second": 100.0}, {"tokens_per_second": 90.0}, {}),
        ({"tokens_per_second": None}, {"tokens_per_second": 1.0}, {}),
        (with_language(0.2, 0.1, 0.3), with_language(0.29), {}),
        (with_language(0.2, 0.1, 0.3), with_language(0.31), {"dnll of sw": True}),
        (with_language(0.2, 0.1, 0.3), with_language(0.05), {"dnll of sw": False}),
        (with_language(0.2, 0.1, None), with_language(0.3), {"dnll of sw": True}),
        (with_language(0.2, 0.1, 0.3), with_language(None), {}),
        ({"languages": "none"}, with_language(1.0), {}),
    ],
)
def test_what_became_worse(before, now, found):
    changes = history.regressions(now, before)
    assert {c["what"]: c["worse"] for c in changes} == found
    assert all(set(c) == {"what", "was", "now", "worse"} for c in changes)


def test_the_worse_stands_first():
    before = with_language(0.2, 0.1, 0.3, bytes=2000)
    worse = [c["worse"] for c in history.regressions(with_language(0.9, bytes=1000), before)]
    assert worse == [True, False]


def distaya(*arguments):
    told = CliRunner().invoke(app, [str(a) for a in arguments])
    assert told.exit_code == 0, told.output
    return told


def test_commands_add_their_runs_and_history_shows_them(kept, tmp_path, monkeypatch):
    base, texts = save_model(tmp_path / "someone" / "base"), save_texts(tmp_path / "texts", 8)
    out, scored = tmp_path / "someone" / "small", ("--texts", texts, "--window", 16, "-q")
    for sparsity in ("0.1", "0.9"):
        distaya("compress", base, "--out", out, "--method", "magnitude", "--sparsity", sparsity,
                "--overwrite", "--quiet")  # fmt: skip
        distaya("eval", out, "--against", base, *scored, "--continuations", 0)
    distaya("bench", "model", out, "--prompt", 4, "--new", 2, "--runs", 1, "--quiet")
    text = kept.read_text()
    assert str(tmp_path) not in text and "someone" not in text
    records = history.read()
    commands = ["compress", "eval", "compress", "eval", "bench model"]
    assert [r["command"] for r in records] == commands
    assert all(r["model"].startswith("small@") for r in records)
    assert len({r["base"] for r in records}) == 1 and records[0]["base"].startswith("base@")
    assert (
        records[0]["recipe"] != records[2]["recipe"] and records[0]["model"] != records[2]["model"]
    )
    size = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert records[3]["bytes"] == size and records[3]["languages"]["ja"]["dnll_interval"]
    assert records[1]["texts"] == records[3]["texts"] is not None

    told = distaya("history").stdout
    assert "worse: " in told and "dnll of" in told and "first of its kind" in told
    runs = json.loads(distaya("history", "--json", "--last", 2).stdout)["runs"]
    assert [r["command"] for r in runs] == ["eval", "bench model"]
    assert any(c["worse"] for c in runs[0]["changes"]) and runs[1]["changes"] is None
    assert len(json.loads(distaya("history", "--json", "--model", "x/base").stdout)["runs"]) == 5
    assert "no run of nobody" in distaya("history", "--model", "nobody").stdout
    monkeypatch.setenv("DISTAYA_HISTORY", "off")
    assert "the history is off" in distaya("history").stdout


def test_a_history_in_the_way_never_stops_a_run(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DISTAYA_HISTORY", str(tmp_path / "file" / "runs.jsonl"))
    model, texts = save_model(tmp_path / "m"), save_texts(tmp_path / "texts", 8)
    told = distaya("eval", model, "--texts", texts, "--window", 16, "--continuations", 0)
    assert "note: this run is not in the history" in told.stderr and "NLL" in told.stdout


def test_a_fingerprint_sees_other_weights_of_one_shape(tmp_path):
    models = [save_model(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    names = [remember.name_of(m) for m in models]
    prints = [name.rpartition("@")[2] for name in names]
    assert prints[0] == prints[1] != prints[2] and names[0].startswith("a@")
    (models[1] / "adapter").mkdir()
    (models[1] / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 100)
    assert remember.name_of(models[1]) != names[1]
    assert remember.name_of("owner/nobody-has-this") == "nobody-has-this@unknown"
    assert "/" not in "".join(names) and Path(names[0]).name == names[0]
