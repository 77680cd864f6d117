"""A folder of every kind that verify looks at, and what it says of one."""

import shutil
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file, save_file
from speaking import save_model, save_texts

from distaya_ext.compress import compress
from distaya_ext.export import export
from distaya_ext.finished import complete
from distaya_ext.train.adapter_write import put_adapter
from distaya_ext.train.learned import LowRank
from distaya_ext.verify import verify

WEIGHTS = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj"
Q = "model.layers.0.self_attn.q_proj"
RECIPES = {
    "dense": {"nm": "2:4"},
    "half": {"sparsity": 0.5},
    "masked": {"sparsity": 0.6, "bits": 4, "group": 32, "embed_bits": 8, "format": "distaya"},
    "2:4 int4": {"nm": "2:4", "bits": 4, "group": 32, "format": "distaya"},
    "int3": {"method": "gptq", "bits": 3, "group": 32, "symmetric": False},
    "pack-quantized": {"method": "gptq", "bits": 4, "group": 32},
}


KINDS = [*RECIPES, "gptq", "exported", "adapted"]


def build(root: Path) -> Path:
    """A folder of every kind."""
    save_model(root / "model", seed=1)
    save_texts(root / "texts", repeat=8)
    for name, fields in RECIPES.items():
        recipe = tiny.recipe(**fields, calibration={"tokens": 480, "window": 16})
        compress(root / "model", root / name, recipe, root / "texts")
    export(root / "pack-quantized", root / "gptq", "gptq")
    export(root / "2:4 int4", root / "exported", "dense")
    shutil.copytree(root / "pack-quantized", root / "adapted")
    low_rank = {Q: LowRank(torch.ones(2, 32), torch.ones(32, 2), 4.0)}
    put_adapter(root / "adapted" / "adapter", low_rank)
    complete(root / "adapted")
    return root


def copy(source: Path, target: Path, manifest: bool = False) -> Path:
    """A folder with its manifest or without."""
    shutil.copytree(source, target)
    if not manifest:
        (target / "manifest.json").unlink(missing_ok=True)
    return target


def told(path, **options):
    return [(found.check, found.where) for found in verify(path, **options).found]


def change(path, name, edit):
    """edit(tensor) in place."""
    tensors = load_file(path / WEIGHTS)
    edit(tensors[name])
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
