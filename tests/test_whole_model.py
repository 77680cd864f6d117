"""bench/whole_model.py on a model of two tiny layers: the commands run and the table is theirs."""

import json
import sys
from pathlib import Path

# Appended, not inserted: an installed distaya_ext must win over the source folder.
sys.path.append(str(Path(__file__).resolve().parent.parent))
from bench import whole_model
from distaya_ext.measure.shapes import Model


def test_the_whole_way_on_a_tiny_model(tmp_path, monkeypatch):
    recipes = {"int4": whole_model.RECIPES["int4 + int8 embedding (rtn)"]}
    monkeypatch.setattr(whole_model, "RECIPES", recipes)
    found = whole_model.run(tmp_path, Model(256, 512, 8, 2, 8192), 2)
    (row,) = found["rows"]
    ours, dense = row["bench"]["rows"]
    assert (ours["name"], dense["name"]) == ("int4", "bf16")
    assert ours["weights"] == "int4, int8" and dense["weights"] == "bfloat16"
    assert 0 < ours["nbytes"] < 0.6 * dense["nbytes"]
    assert row["peak"] > 1 << 26 and row["seconds"] > 0
    assert str(tmp_path) not in json.dumps(found)
    assert whole_model.text(found).splitlines()[-1].startswith("| int4")
