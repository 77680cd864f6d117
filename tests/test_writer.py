"""The writer: shards, index, and an output folder that is there completely or not at all."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file

from distaya_ext.checkpoint import ShardWriter, Staging, copy_companions
from distaya_ext.errors import InputError

INDEX = "model.safetensors.index.json"


def test_writer_one_file_or_shards_with_index(tmp_path):
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    for folder, limit, count in (("one", 1 << 20, 1), ("many", 80, 3)):
        (tmp_path / folder).mkdir()
        writer = ShardWriter(tmp_path / folder, limit)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        paths = writer.finish()
        assert len(paths) == count
        assert (tmp_path / folder / INDEX).exists() == (count > 1)
        merged = {k: v for path in paths for k, v in load_file(path).items()}
        assert all(torch.equal(merged[name], tensors[name]) for name in tensors)
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert index["metadata"]["total_size"] == 200
    assert index["weight_map"]["t4"] == "model-00003-of-00003.safetensors"


def test_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError, match="half way"), Staging(tmp_path / "out") as staging:
        (staging.model / "file").write_text("x")
        raise RuntimeError("half way")
    assert list(tmp_path.iterdir()) == []


def test_output_folder_rules(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    Staging(out)  # empty: fine
    (out / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        Staging(out)
    with pytest.raises(InputError, match="not written by distaya"):
        Staging(out, overwrite=True)
    (out / "recipe.yaml").write_text("sugar: 100 g\n")
    with pytest.raises(InputError, match="not written by distaya"):
        Staging(out, overwrite=True)
    with pytest.raises(InputError, match="model folder itself"):
        Staging(out, overwrite=True, source=out)
    with pytest.raises(InputError, match="not a folder"):
        Staging(out / "thesis.tex")


def test_edited_readme_survives_overwriting(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "recipe.yaml").write_text("# distaya_ext recipe\n")
    (out / "README.md").write_text("my notes")
    with Staging(out, overwrite=True) as staging:
        (staging.model / "README.md").write_text("the model card")
        staging.publish()
    assert [path.name for path in out.iterdir()] == ["README.md"]
    assert (out / "README.md").read_text() == "my notes"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_companions_are_copied_code_and_weights_are_not(tmp_path):
    single = tiny.make(tmp_path / "model", tiny.FAMILIES["llama"])
    (single / "LICENSE").write_text("free")
    (single / "modeling.py").write_text("import os")
    (single / "results.json").write_text("{}")
    target = tmp_path / "target"
    target.mkdir()
    names = copy_companions(single, target)
    assert {"LICENSE", "config.json", "generation_config.json"} <= set(names)
    assert not {"modeling.py", "model.safetensors", "results.json"} & set(names)
    assert (target / "config.json").read_bytes() == (single / "config.json").read_bytes()
