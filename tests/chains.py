"""Chains on a part of the bundled model, with healing that takes no time."""

import hashlib
import shutil
import sys
import types
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from distaya_ext.compress import compress
from distaya_ext.recipe import Recipe

ASSETS = Path(str(files("distaya_ext"))) / "assets"


def texts(
    folder: Path, kind: str = "calibration", languages: tuple[str, ...] = ("en", "ja")
) -> Path:
    """A folder of a few of the bundled languages."""
    folder.mkdir()
    for lang in languages:
        shutil.copy(ASSETS / "texts" / kind / f"{lang}.txt", folder)
    return folder


def shallow(folder: Path, layers: int = 3) -> Path:
    """The bundled model's first layers."""
    source = ASSETS / "nano-aya"
    gone = list(range(layers, 8))
    compress(source, folder, Recipe(model=str(source), method="dense", drop_layers=gone))
    return folder


def recipe(model: Path, calib: Path, **fields) -> Recipe:
    """Drop one of the layers, 2:4 and int4."""
    calibration = {"path": str(calib), "tokens": 512, "window": 64}
    base = {
        "drop_layers": {"count": 1, "score": "bi", "tokens": 256},
        "method": "sparsegpt", "nm": "2:4", "bits": 4, "group": 32, "quality": "plain",
    }  # fmt: skip
    return Recipe(**{"model": str(model), "calibration": calibration, **base, **fields})


def hashes(folder: Path) -> dict[str, str]:
    """Of every file but those that tell times."""
    timed = ("results.json", "steps.json", "layers.csv", "evaluation.json", "training.json",
             "manifest.json", "report.html", "README.md")  # fmt: skip
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name not in timed
    }


def fake_distill(steps_done: list[int] | None = None, at_step=lambda step: None):
    """A distill() that adds 1 to the last norm's weight in every step, with a checkpoint each."""
    done = [] if steps_done is None else steps_done

    def distill(teacher, student, out, texts, spec, *, work, **_):
        work.mkdir(exist_ok=True)
        start = len(list(work.glob("*.step")))
        for step in range(start, spec.steps):
            at_step(step)
            (work / f"{step}.step").write_text(f"{teacher} {texts}")
            done.append(step)
        part = work / "made"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(student, part)
        tensors = load_file(part / "model.safetensors")
        tensors["model.norm.weight"] += torch.tensor(spec.steps * spec.learning_rate)
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        (part / "training.json").write_text("{}")
        part.rename(out)
        shutil.rmtree(work)

    return distill


def give(monkeypatch, distill) -> None:
    """Let heal() import this distill."""
    module = types.ModuleType("distaya_ext.train.distill")
    module.distill = distill
    if monkeypatch is None:
        sys.modules[module.__name__] = module
    else:
        monkeypatch.setitem(sys.modules, module.__name__, module)
