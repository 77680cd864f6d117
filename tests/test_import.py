"""`import distaya_ext` is fast and changes nothing but what it says: a finder for transformers."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = str(Path(__file__).with_name("imported.py"))
HEAVY = ("transformers", "peft", "accelerate", "lm_eval", "jinja2", "datasets", "matplotlib")
HEAVY += ("rich", "typer", "compressed_tensors", "pyarrow", "selenium", "tokenizers", "psutil")
RUNS = 3


@pytest.fixture(scope="module")
def imports() -> list[dict]:
    """Fresh interpreters; compiled files are not written, as if they had been before."""
    found = []
    for _ in range(RUNS):
        done = subprocess.run(
            [sys.executable, CHILD],
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert done.stderr == ""
        found.append(json.loads(done.stdout))
    return found


def test_nothing_is_changed(imports):
    """Environment, threads, open files, signals, warnings, random states, torch's settings."""
    assert [run["changed"] for run in imports] == [{}] * RUNS


def test_nothing_is_written_or_started(imports):
    assert [run["writes"] for run in imports] == [[]] * RUNS


def test_heavy_packages_wait_until_they_are_needed(imports):
    assert [sorted(set(run["modules"]) & set(HEAVY)) for run in imports] == [[]] * RUNS


def test_one_finder_waits_for_transformers(imports):
    """The documented side effect: transformers learns of our format when somebody imports it."""
    assert [run["finders"] for run in imports] == [["distaya_ext.runtime.register"]] * RUNS


def test_it_adds_little_to_torch(imports):
    """Less than torch itself takes; both in one interpreter, so that a busy machine is fair."""
    ratios = [ours / torch for torch, ours in (run["seconds"] for run in imports)]
    assert statistics.median(ratios) < 1, ratios
