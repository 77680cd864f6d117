"""Ways to damage a healthy folder: each returns (or is) a function of the folder's path."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from distaya_ext.checkpoint import ShardWriter

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"

Damage = Callable[[Path], object]


def edit_json(name: str, **fields: object) -> Damage:
    def damage(model: Path) -> None:
        path = model / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


def edit_tensors(change: Callable[[dict], object]) -> Damage:
    def damage(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        change(tensors)
        save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})

    return damage


def shard(model: Path) -> dict[str, str]:
    """The same weights in several shards; returns the index's weight_map."""
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    writer = ShardWriter(model, shard_bytes=sum(t.nbytes for t in tensors.values()) // 3)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    assert len(writer.finish()) > 2
    return json.loads((model / INDEX).read_text())["weight_map"]


def edit_index(**entries: str) -> Damage:
    def damage(model: Path) -> None:
        weight_map = shard(model)
        new = {name.replace("__", "."): file for name, file in entries.items()}
        (model / INDEX).write_text(json.dumps({"weight_map": weight_map | new}))

    return damage


def forget_in_index(model: Path) -> None:
    weight_map = shard(model)
    weight_map.pop("model.norm.weight")
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def lose_shards(model: Path) -> None:
    shard(model)
    for path in sorted(model.glob("model-*.safetensors"))[:2]:
        path.unlink()


def link_out(name: str) -> Damage:
    def damage(model: Path) -> None:
        (model / name).replace(model.parent / "elsewhere")
        (model / name).symlink_to(model.parent / "elsewhere")

    return damage


def truncate(model: Path) -> None:
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(data[:-1000])


def header(text: bytes, length: int | None = None) -> Damage:
    def damage(model: Path) -> None:
        size = len(text) if length is None else length
        (model / WEIGHTS).write_bytes(size.to_bytes(8, "little") + text + bytes(8))

    return damage


def rename(old: str, new: str) -> Damage:
    return lambda model: (model / old).rename(model / new)


def remove(*names: str) -> Damage:
    return lambda model: [(model / name).unlink() for name in names]


def write(name: str, data: bytes) -> Damage:
    return lambda model: (model / name).write_bytes(data)


def change_tokenizer(change: Callable[[dict], object]) -> Damage:
    def damage(model: Path) -> None:
        whole = json.loads((model / "tokenizer.json").read_text())
        change(whole)
        (model / "tokenizer.json").write_text(json.dumps(whole))

    return damage


def poison(value: float) -> Damage:
    return edit_tensors(lambda tensors: tensors[UP][3].fill_(value))
