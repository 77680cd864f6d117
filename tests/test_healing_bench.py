"""bench/healing.py and bench/layers.py: what their tables say, and that a changed code is seen."""

import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).resolve().parent.parent))
from bench import healing, layers
from bench.quality_score import Language, Scores
from distaya_ext.compress import compress
from distaya_ext.recipe import Recipe


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("healing")
    folder = tiny.make(root / "dense", tiny.FAMILIES["cohere"], dtype=torch.bfloat16)
    recipe = Recipe(model=str(folder), method="rtn", bits=4, group=32)
    compress(folder, root / "packed", recipe)
    return root / "packed"


def test_a_row_says_what_came_back():
    lost = {"en": [0.4, 0.6], "ja": [1.0, 1.0]}
    left = {"en": [0.2, 0.3], "ja": [0.75, 0.75]}
    record = {
        "student": "small",
        "deltas": {"before": lost, "after": left},
        "kl": [0.5, 0.2],
        "bits": [4.125, 5.0],
        "minutes": 9.96,
    }
    cells = [cell.strip() for cell in healing.row(record).strip("|").split("|")]
    assert cells[:3] == ["small", "+0.7500", "+0.5000"]
    assert cells[3].startswith("33 % [") and cells[4] == "ja 25 %" and cells[5] == "ja +0.750"
    assert cells[6:] == ["0.500 → 0.200", "4.12 → 5.00", "10.0"]


@pytest.mark.parametrize("which, scales", [("weight_packed", False), ("weight_scale", False)])
def test_a_changed_tensor_is_seen(packed, tmp_path, which, scales):
    other = tmp_path / "other"
    shutil.copytree(packed, other)
    assert healing.unchanged(packed, other, scales) > 0
    tensors = load_file(other / "model.safetensors")
    name = next(n for n in tensors if n.endswith(which))
    tensors[name] = tensors[name] + tensors[name]
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=which):
        healing.unchanged(packed, other, scales)
    if which == "weight_scale":  # scales that were to learn may differ
        assert healing.unchanged(packed, other, True) > 0


def test_bits_are_those_of_the_files(packed):
    assert 4.25 < healing.bits(packed) < 6  # codes, scales in groups of 32, norms


def test_choices_have_their_place_among_all_sets():
    def lost(delta: float) -> Scores:
        return Scores({"en": Language(1.0, delta, delta / 2, 0.0, 0.9, [delta, delta])}, 0.0)

    sets = {(0, 1): lost(3.0), (0, 2): lost(1.0), (1, 2): lost(2.0)}
    lines = layers.table({"kl": (1, 2), "bi": (1, 2), "l2": (0, 1)}, sets).splitlines()[2:]
    assert lines[0] == "| the best there is | 0, 2 | +1.000 | en +1.00 | 0.500 | 1 of 3 |"
    assert lines[1] == "| kl; bi | 1, 2 | +2.000 | en +2.00 | 1.000 | 2 of 3 |"
    assert lines[2].endswith("| 3 of 3 |") and len(lines) == 3
