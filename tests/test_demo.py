"""The demo: its whole way on a tiny bundle, and that the real bundle is what it expects."""

import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from speaking import SENTENCES, save_model, save_texts
from typer.testing import CliRunner

from distaya_ext.cli import demo as demo_module
from distaya_ext.cli.app import app
from distaya_ext.texts import read_texts


def distaya(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@dataclass
class Bundle:
    """Stands where the package's own folder is looked up."""

    root: Path
    asked: list = field(default_factory=list)

    def files(self, package):
        self.asked.append(package)
        return self.root


def test_demo_on_a_tiny_bundle(monkeypatch, tmp_path):
    """The whole demo, with a model that takes no time in place of the bundled one."""
    assets = tmp_path / "package" / "assets"
    save_model(assets / "nano-aya", seed=3)
    save_texts(assets / "texts" / "calibration", repeat=8)
    save_texts(assets / "texts" / "evaluation")
    monkeypatch.setattr(demo_module.resources, "files", Bundle(tmp_path / "package").files)
    monkeypatch.setattr(demo_module, "_WINDOW", 16)
    small = (("50 %", "half", {"sparsity": 0.5}), ("2:4", "2of4", {"nm": "2:4"}))
    monkeypatch.setattr(demo_module, "TRIALS", small)
    result = distaya("demo", "--out", tmp_path / "kept")
    assert result.exit_code == 0, result.stderr
    for word in ("before", "50 %", "95 % CI", "worst", "human evaluation", str(tmp_path / "kept")):
        assert word in " ".join(result.stdout.replace("\n", "").split()) or word in result.stdout
    assert all(f"\n{lang}: " in result.stdout for lang in SENTENCES)
    result = distaya("demo", "--out", tmp_path / "again", "--quick", "--json", "--quiet")
    found = json.loads(result.stdout)
    assert [trial["label"] for trial in found["trials"]] == ["50 %"]
    assert {row["language"] for row in found["trials"][0]["evaluation"]["languages"]} == set(
        SENTENCES
    )
    assert (tmp_path / "again" / "half" / "config.json").is_file()


def test_the_bundle_is_there():
    with resources.as_file(resources.files("distaya_ext") / "assets") as assets:
        evaluation = read_texts(assets / "texts" / "evaluation", parallel=True)
        calibration = read_texts(assets / "texts" / "calibration", parallel=True)
        assert (assets / "nano-aya" / "model.safetensors").is_file()
    assert len(evaluation) == 23 and set(demo_module.SPOKEN) <= evaluation.keys()
    assert evaluation.keys() == calibration.keys()
