"""A whole chain by several processes: the steps, the bytes and the figures of one process."""

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import chains
import pytest
from ranked import Ranks, run_ranks

from distaya_ext.compress import compress
from distaya_ext.ranks import team

# A step of training has at least a row for each part.
HEAL = {"steps": 3, "batch_tokens": 256, "window": 64, "parts": 2, "rank": 4}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    chains.shallow(folder / "source")
    chains.texts(folder / "calib")
    chains.texts(folder / "heldout", "evaluation")
    return folder


def whole(given: Path, out: Path) -> dict[str, Any]:
    """drop, compress, heal, evaluate, in two parts."""
    held = {"path": str(given / "heldout"), "tokens": 256, "window": 64}
    calibration = {"path": str(given / "calib"), "tokens": 512, "window": 64, "parts": 2}
    recipe = chains.recipe(
        given / "source", given / "calib", evaluate=held, heal=HEAL, calibration=calibration
    )
    found = compress(given / "source", out, recipe)
    return {"kept": sorted(found.kept), "evaluations": found.evaluations}


def bytes_of(folder: Path) -> dict[str, str]:
    """Hashes of all weights, and of what tells how they were made."""
    found = [*folder.rglob("*.safetensors"), folder / "recipe.yaml", folder / "layers.json"]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(found)
    }


def timeless(evaluations: dict[str, Any]) -> str:
    for each in evaluations.values():
        for name in ("seconds", "written", "continuations"):
            each.pop(name, None)
    return json.dumps(evaluations, sort_keys=True)


def killed(given: Path, out: Path) -> None:
    """Rank 1 is killed when the compression is done and healing begins."""
    from distaya_ext.chain import steps

    def heal(*_: Any) -> None:
        if team().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        team().wait()

    steps.heal = heal
    whole(given, out)


def test_two_ranks_make_what_one_process_makes(given: Path, tmp_path: Path) -> None:
    (one,) = run_ranks(1, whole, given, tmp_path / "one")
    two = run_ranks(2, whole, given, tmp_path / "two")
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")
    expected = timeless(one["evaluations"])
    for found in two:
        assert found["kept"] == [] and timeless(found["evaluations"]) == expected
    ends = Ranks(2, killed, given, tmp_path / "stopped").ends()
    assert ends[1][1][0] == "gone" and ends[0][1][0] == "LostError", ends
    assert "compress" in ends[0][1][2] or not (tmp_path / "stopped").exists()
    for found in run_ranks(2, whole, given, tmp_path / "stopped"):
        assert found["kept"] == ["compress", "drop"]
    assert bytes_of(tmp_path / "stopped") == bytes_of(tmp_path / "one")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
