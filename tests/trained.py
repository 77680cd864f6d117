"""Compressed tiny folders to train, and training that is short enough for a test."""

from pathlib import Path

import packed_folders
import tiny
import torch
from packed_folders import w4
from safetensors.torch import load_file, save_file

import distaya_ext
from distaya_ext.checkpoint import copy_companions, open_checkpoint
from distaya_ext.train.parts import Parts, prepare
from distaya_ext.train.spec import TrainSpec

IDS = torch.randint(3, tiny.VOCAB, (2, 12), generator=torch.Generator().manual_seed(5))
FAMILIES = ("cohere", "cohere2", "llama-bias", "qwen2", "gemma")


def folder(root: Path, family: str, kind: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny model of the family, compressed; made once per root."""
    out = root / f"{family}-{kind}-{str(dtype)[6:]}".replace(" ", "-").replace(":", "")
    if out.exists():
        return out if kind in ("dense", "2:4") else out / "packed"
    source = root / f"{family}-source-{str(dtype)[6:]}"
    if not source.exists():
        tiny.make(source, tiny.FAMILIES[family], dtype=dtype)
    if kind == "dense":
        return source
    if kind == "2:4":
        return sparse(source, out)
    options = {
        "half int4": {"pattern": "half"},
        "2:4 int4": {"pattern": "2:4", "method": "distaya"},
        "embed int8": {"method": "distaya", "embed_bits": 8},
    }[kind]
    return packed_folders.write(source, out, w4(), **options)[0]


def sparse(source: Path, out: Path) -> Path:
    """The folder with the Linears of its layers 2:4."""
    out.mkdir()
    copy_companions(source, out)
    tensors = load_file(source / "model.safetensors")
    for name in open_checkpoint(source).linears():
        W = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = packed_folders.prune(W.float(), "2:4").to(W.dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def prepared(path: Path, dtype="auto", **fields) -> Parts:
    """The folder's model with what a TrainSpec of these fields says learns."""
    fields.setdefault("rank", 4)
    return prepare(distaya_ext.load(path, dtype=dtype), TrainSpec(**fields))


def learn(parts: Parts, steps: int = 2, rate: float = 0.02) -> list[float]:
    """AdamW on the texts above; the losses on the way."""
    learnt = list(parts.trainable().values())
    optimiser = torch.optim.AdamW(learnt, lr=rate, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        loss = parts.model(input_ids=IDS, labels=IDS, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder that is one file."""
    return load_file(path / "model.safetensors")
