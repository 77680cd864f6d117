"""A training that is killed and started again ends as if it had not been."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLACES = ("early", "step", "evaluated", "interrupt", "saving", "times")
HERE = Path(__file__).parent
LAST = "checkpoint-00000014"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Folders of the runs of killed_training.py."""
    root = tmp_path_factory.mktemp("runs")
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "killed_training.py"), str(root)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    (root / "said").write_text(done.stdout)
    return root


def metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics without what the clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


@pytest.mark.parametrize("place", PLACES)
def test_killed_and_started_again(runs, place):
    whole, again = runs / "whole", runs / place
    names = ("parameters", "optimizer", "generators")
    for name in ("best/parameters", *(f"{LAST}/{name}" for name in names)):
        file = f"{name}.safetensors"
        assert (whole / file).read_bytes() == (again / file).read_bytes(), file
    assert metrics(whole) == metrics(again)


def test_metrics_have_every_step_once(runs):
    for place in ("whole", *PLACES):
        lines = metrics(runs / place)
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, 15))
        assert [line["step"] for line in lines if "held_out" in line] == [0, 4, 8, 12, 14]


def test_they_were_killed_where_we_say(runs):
    said = (runs / "said").read_text()
    left = {line.split()[0]: line.split()[1:] for line in said.splitlines() if ".lock" in line}
    folders = {place: [name for name in names if "0000" in name] for place, names in left.items()}
    assert folders == {
        "early": ["checkpoint-00000000"],
        "step": ["checkpoint-00000003", "checkpoint-00000006"],
        "evaluated": ["checkpoint-00000006", "checkpoint-00000009"],
        "interrupt": ["checkpoint-00000003", "checkpoint-00000006"],
        "saving": [".partial-00000006", "checkpoint-00000000", "checkpoint-00000003"],
    }
    assert int(said.split()[-1]) > 1  # "times 5": killed five times


def test_only_what_learns_and_the_newest_two_are_kept(runs):
    kept = sorted(p.name for p in (runs / "step").glob("*checkpoint*"))
    assert kept == ["checkpoint-00000012", LAST]
    assert not list((runs / "saving").glob(".partial*"))
