"""`distaya plan` on the command line."""

import json

import pytest
import tiny
from typer.testing import CliRunner

from bench.plan import TEXTS
from distaya_ext.cli.app import app
from distaya_ext.compress import budget
from distaya_ext.planning import fits, probe

NANO = str(TEXTS.parents[1] / "nano-aya")


@pytest.fixture(autouse=True)
def told(monkeypatch):
    monkeypatch.setattr(probe, "ask", lambda request: {"process": 400 << 20, "startup": 1.0})


def run(*args):
    return CliRunner().invoke(app, ["plan", NANO, "--no-rehearsal", *args])


def test_json_and_tables_tell_the_same(monkeypatch):
    flags = ["--sparsity", "2:4", "--bits", "4", "--calib", str(TEXTS), "--tokens", "5888"]
    flags += ["--window", "256"]
    found = run(*flags, "--json")
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert told["tokens"] == 5888 and told["time"] is None
    shown = run(*flags)
    assert shown.exit_code == 0
    for word in ("memory", "disk", "embedding", "bits per weight", "For the same bytes"):
        assert word in shown.stdout
    assert f"{told['ram']['peak'] / 2**20:.1f} MiB" in shown.stdout


def test_flags_that_compress_refuses_are_refused():
    assert run("--sparsity", "2:4").exit_code == 2  # no texts
    assert run("--method", "magnitude", "--sparsity", "0.5", "--group", "64").exit_code == 2


def test_what_cannot_fit_exits_5(monkeypatch):
    for module in (fits, budget):
        monkeypatch.setattr(module, "physical_bytes", lambda: 401 << 20)
    found = run("--method", "rtn", "--bits", "4")
    assert found.exit_code == 5 and "this machine has 0.39 GiB" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_a_recipe_file_with_limits(tmp_path):
    recipe = tiny.recipe("rtn", bits=4, max_ram="100MiB")
    recipe.to_yaml(tmp_path / "recipe.yaml")
    assert run("--recipe", str(tmp_path / "recipe.yaml")).exit_code == 2
    assert run("--recipe", str(tmp_path / "recipe.yaml"), "--max-ram", "4GiB").exit_code == 0
