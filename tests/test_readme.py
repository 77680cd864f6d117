"""README.md is a promise: its commands and its Python must be true."""

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import distaya_ext
from distaya_ext import Quant, Recipe, compress, evaluate, read_texts
from distaya_ext.cli.app import app
from distaya_ext.ops import hessian, obs

README = Path(__file__).parent.parent / "README.md"
ASSETS = Path(distaya_ext.__file__).parent / "assets"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.M | re.S)


def test_the_two_commands_are_there_for_ci():
    marked = README.read_text().split("<!-- two commands -->")[1].split("<!-- /two commands -->")[0]
    lines = [line for line in marked.splitlines() if line.startswith("pip install")]
    assert lines == ["pip install . && distaya demo", "pip install '.[test]' && pytest"]


def test_every_flag_in_the_commands_exists():
    shell = "\n".join(blocks(""))
    commands = re.findall(r"distaya ((?:bench )?\w+)((?:.*\\\n)*.*)", shell)
    assert {name for name, _ in commands} >= {"demo", "doctor", "inspect", "compress", "eval"}
    assert "bench model" in {name for name, _ in commands}
    for name, rest in commands:
        text = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "200"}).output
        for flag in re.findall(r"--[a-z-]+", rest):
            assert flag in text, f"distaya {name} has no {flag}"


def test_the_python_example_runs_in_under_fifteen_lines(tmp_path, monkeypatch):
    code = blocks("python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) < 15
    monkeypatch.chdir(tmp_path)
    for name, half in (("texts", "calibration"), ("heldout", "evaluation")):
        (tmp_path / name).mkdir()
        for lang in ("en", "ja"):
            source = (ASSETS / "texts" / half / f"{lang}.txt").read_text(encoding="utf-8")
            (tmp_path / name / f"{lang}.txt").write_text(source, encoding="utf-8")
    code = code.replace("CohereLabs/aya-expanse-8b", str(ASSETS / "nano-aya"))
    code = code.replace("262_144", "2_048").replace("ratio=1.2", "ratio=9.9")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "aya-2of4-w4" / "results.json").exists()


def test_the_loading_example_runs(tmp_path):
    (code,) = (c for c in blocks("python") if "distaya_ext.load" in c)
    recipe = Recipe(model=str(ASSETS / "nano-aya"), method="magnitude", nm="2:4", bits=4)
    compress(recipe.model, tmp_path / "small", recipe)
    names = {"ids": torch.tensor([[1, 5, 6]])}
    exec(compile(code.replace("aya-2of4-w4", str(tmp_path / "small")), "README.md", "exec"), names)
    assert distaya_ext.resident_bytes(names["model"]) < 0.8 * 16257664  # nano-aya in bf16


def test_the_kernel_example_runs():
    (code,) = (c.replace("4096", "64") for c in blocks("python") if "hessian.Hessian" in c)
    names = {"activations": torch.randn(3, 50, 64), "weight": torch.randn(32, 64)}
    code = code.replace("group=128", "group=32")
    exec(compile(code, "README.md", "exec"), names)
    assert names["out"].mask.view(32, 16, 4).sum(-1).eq(2).all()


def test_public_names_are_the_functions_not_the_packages():
    import distaya_ext.compress.driver
    import distaya_ext.evaluate.result

    assert callable(compress) and callable(evaluate) and callable(read_texts)
    assert distaya_ext.compress is compress and distaya_ext.evaluate is evaluate
    assert Quant is not None and hessian.Hessian and obs.obs


@pytest.mark.parametrize("name", distaya_ext.__all__)
def test_public_names_have_docstrings(name):
    assert getattr(distaya_ext, name).__doc__
