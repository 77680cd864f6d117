"""compress() by several processes: the same bits as by one that sums in as many parts."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import tiny
from ranked import run_ranks

from distaya_ext.compress import compress

RECIPES: dict[str, dict[str, Any]] = {
    "plain 2:4": {"nm": "2:4", "quality": "plain"},
    "2:4": {"nm": "2:4"},
    "half": {"sparsity": 0.5},
    "int4": {"method": "gptq", "bits": 4, "group": 32, "embed_bits": 8},
    "2:4+int4, high": {"nm": "2:4", "bits": 4, "group": 32, "quality": "high"},
    "half, high": {"sparsity": 0.5, "quality": "high"},
    "int3, activation": {"method": "gptq", "bits": 3, "group": 32, "order": "activation"},
    "2:4, group": {"nm": "2:4", "order": "group"},
    "wanda": {"method": "wanda", "sparsity": 0.5},
    "ria": {"method": "ria", "nm": "2:4"},
    "dass": {"method": "dass", "nm": "2:4"},
    "magnitude": {"method": "magnitude", "sparsity": 0.5},
    "worst": {"nm": "2:4", "calibration": {"weights": "worst"}},
    "permute": {"nm": "2:4", "permute": True},
}


def weights(folder: Path) -> str:
    """A hash of all weight files."""
    made = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        made.update(path.read_bytes())
    return made.hexdigest()


def run(
    source: Path, out: Path, fields: dict[str, Any], parts: int | None, windows: int = 25
) -> dict[str, Any]:
    fields = dict(fields)
    calibration = {"tokens": 1 << 20, **fields.pop("calibration", {}), "parts": parts}
    recipe = tiny.recipe(fields.pop("method", "sparsegpt"), calibration=calibration, **fields)
    report = compress(source, out, recipe, tiny.windows(windows))
    return report.summary()


def many(source: Path, out: Path, cases: dict[str, dict[str, Any]], parts: int | None) -> list:
    return [run(source, out / name, fields, parts) for name, fields in cases.items()]


@pytest.mark.parametrize("family", ["cohere", "llama-bias"])
def test_same_weights_for_every_number_of_ranks(family: str, tmp_path: Path) -> None:
    source = tiny.make(tmp_path / "model", tiny.FAMILIES[family])
    for parts in (2, 3):
        run_ranks(1, many, source, tmp_path / f"one{parts}", RECIPES, parts)
    told = {
        world: run_ranks(world, many, source, tmp_path / str(world), RECIPES, None)
        for world in (2, 3)
    }
    run_ranks(2, many, source, tmp_path / "2of3", RECIPES, 3)
    for name in RECIPES:
        two, three = (weights(tmp_path / f"one{parts}" / name) for parts in (2, 3))
        assert weights(tmp_path / "2" / name) == two, name
        assert weights(tmp_path / "3" / name) == three, name
        assert weights(tmp_path / "2of3" / name) == three, name
    for found in told.values():
        assert all(each == found[0] for each in found)
