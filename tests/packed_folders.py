"""Folders of packed models and their dense twins: round-to-nearest grids of a dense folder."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distaya_ext.checkpoint import copy_companions, open_checkpoint
from distaya_ext.formats import Grid, ModuleScheme, compressed, gptq, own
from distaya_ext.models.skeleton import build_skeleton
from distaya_ext.ops import obs
from distaya_ext.quant import Quant

WRITERS = {
    "pack-quantized": lambda modules: compressed.write(modules, ["lm_head"]),
    "gptq": lambda modules: gptq.write(modules, ["lm_head"]),
    "distaya": own.write,
}


def prune(W: torch.Tensor, pattern: str | None) -> torch.Tensor:
    """The larger weights of each group ("2:4", "out 2:4"), or the larger half of all ("half")."""
    if pattern is None:
        return W
    if pattern == "half":
        return torch.where(W.abs() >= W.abs().median(), W, 0.0)
    V = W.t() if pattern.startswith("out") else W
    order = V.abs().reshape(len(V), -1, 4).argsort(dim=2).argsort(dim=2)
    kept = torch.where((order >= 2).reshape(V.shape), V, 0.0)
    return kept.t().contiguous() if pattern.startswith("out") else kept


def grid_of(W: torch.Tensor, scheme: ModuleScheme, scales: torch.dtype) -> Grid:
    """Round W to the nearest codes of the scheme."""
    quant = Quant(scheme.bits, scheme.group, scheme.symmetric, scale_dtype=scales)
    _, codes, scale, zeros = obs.quantize(W.float().contiguous(), quant)
    zeros = None if scheme.symmetric else zeros.to(torch.uint8)
    return Grid(codes, scale.to(scales), zeros, scheme.bits, scheme.group)


def write(
    source: Path,
    out: Path,
    scheme: ModuleScheme,
    *,
    method: str = "pack-quantized",
    pattern: str | None = None,
    embed_bits: int | None = None,
    scales: torch.dtype = torch.bfloat16,
) -> tuple[Path, Path]:
    """Quantise a dense folder; returns the packed folder and its dense twin in float32."""
    checkpoint = open_checkpoint(source)
    skeleton = build_skeleton(checkpoint.config, torch.float32)
    table = checkpoint.architecture
    packed, dense, modules = {}, {}, {}
    weights = checkpoint.read(checkpoint.entries)
    for name, module in skeleton.named_modules():
        if name == table.embed and embed_bits:
            modules[name] = ModuleScheme(embed_bits, 0, True, kind=f"int{embed_bits}")
        elif isinstance(module, nn.Linear) and name.startswith(f"{table.layers}."):
            modules[name] = scheme
    for name, W in weights.items():
        module = name.removesuffix(".weight")
        if module not in modules or name.endswith(".bias"):
            packed[name] = dense[name] = W
            continue
        its = modules[module]
        grid = grid_of(W if its.bits == 8 else prune(W.float(), pattern), its, scales)
        packed |= {f"{module}.{suffix}": t for suffix, t in its.encode(grid).items()}
        dense[name] = grid.dense(torch.float32)
    for folder, tensors in ((out / "packed", packed), (out / "twin", dense)):
        folder.mkdir(parents=True)
        copy_companions(source, folder)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    edit_config(out / "packed", quantization_config=WRITERS[method](modules))
    edit_config(out / "twin", dtype="float32")
    return out / "packed", out / "twin"


def edit_config(folder: Path, **fields) -> None:
    """Change fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(folder: Path, change) -> None:
    """change(tensors) in place, then save them again."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def w4(group: int = 32, symmetric: bool = True, **fields) -> ModuleScheme:
    """Four bits."""
    return replace(ModuleScheme(4, group, symmetric), **fields)
