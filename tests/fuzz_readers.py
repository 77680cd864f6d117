"""Fuzz targets that read folders and files: models, recipes, texts, adapters, tokenizers.

Each prepares a healthy input once and damages a copy of one of its files by every byte string.
"""

import io
import json
import shutil
from pathlib import Path

import packed_folders
import pyarrow as pa
import pyarrow.parquet as pq
import tiny
import torch
from fuzzing import Dice, Target, edited, flipped, guarded, json_file, spliced
from safetensors.torch import load_file, save
from speaking import SENTENCES, save_model, tokenizer

from distaya_ext.checkpoint import ShardWriter, open_checkpoint
from distaya_ext.documents import open_texts
from distaya_ext.recipe import Recipe, read_fields
from distaya_ext.tokenizer import load_tokenizer
from distaya_ext.train.adapter import read_adapter
from distaya_ext.train.chat import chat_files, read_chats

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"


def _read(folder: Path) -> None:
    """All that every command does with a model folder before it works."""
    with guarded(folder):
        checkpoint = open_checkpoint(folder, packed=True)
        if checkpoint.nbytes < 1 << 24:
            checkpoint.read(checkpoint.entries)
            for module in checkpoint.stored:
                checkpoint.grid(module)


# ---- config.json ----


def _configs(folder: Path) -> list[tuple[Path, dict]]:
    families = [tiny.FAMILIES[name] for name in ("cohere", "cohere2", "gemma3_text", "qwen3")]
    made = [tiny.make(folder / str(i), config) for i, config in enumerate(families)]
    return [(path, json.loads((path / CONFIG).read_text())) for path in made]


def _config(state: list, dice: Dice) -> None:
    path, config = dice.choose(state)
    (path / CONFIG).write_bytes(json_file(config, dice))
    _read(path)


# ---- the index, and the header of a shard ----


def _sharded(folder: Path) -> tuple[Path, dict]:
    model = tiny.make(folder / "model", tiny.FAMILIES["llama"])
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    writer = ShardWriter(model, shard_bytes=sum(t.nbytes for t in tensors.values()) // 3)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    (model / "sub").mkdir()
    (model / "dangling.safetensors").symlink_to("nothing.safetensors")
    (model / "loop.safetensors").symlink_to("loop.safetensors")
    return model, json.loads((model / INDEX).read_text())


def _index(state: tuple, dice: Dice) -> None:
    model, index = state
    (model / INDEX).write_bytes(json_file(index, dice))
    _read(model)


def _single(folder: Path) -> tuple[Path, dict, bytes]:
    model = tiny.make(folder / "model", tiny.FAMILIES["cohere"], dtype=torch.bfloat16)
    data = (model / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    return model, json.loads(data[8 : 8 + length]), data[8 + length :]


def _header(state: tuple, dice: Dice) -> None:
    model, header, body = state
    text = json_file(header, dice)
    length = len(text) if dice.byte() % 4 else int.from_bytes(dice.take(8), "little")
    whole = (length % (1 << 64)).to_bytes(8, "little") + text + body
    if dice.byte() % 4 == 1:
        whole = flipped(whole, dice)
    (model / WEIGHTS).write_bytes(whole)
    _read(model)


# ---- quantised folders ----


def _quantised(folder: Path) -> list[tuple[Path, dict, dict]]:
    source = tiny.make(folder / "dense", tiny.FAMILIES["llama"])
    # fmt: off
    ways = {
        "distaya": packed_folders.w4(symmetric=False, kind="int4-2:4"),
        "pack-quantized": packed_folders.w4(),
        "gptq": packed_folders.w4(encoding="gptq", symmetric=False, offset=1),
    }
    # fmt: on
    found = []
    for method, scheme in ways.items():
        out = folder / method
        pattern = "2:4" if method == "distaya" else None
        packed_folders.write(source, out, scheme, method=method, pattern=pattern)
        shutil.rmtree(out / "twin")
        config = json.loads((out / "packed" / CONFIG).read_text())
        held = load_file(out / "packed" / WEIGHTS)
        found.append((out / "packed", config, {k: t.clone() for k, t in held.items()}))
    return found


def _quantisation(state: list, dice: Dice) -> None:
    path, config, tensors = dice.choose(state)
    about = config["quantization_config"]
    if dice.byte() % 2:
        about = edited(about, dice)
    names, changed = sorted(tensors), dict(tensors)
    while dice.left and names:
        name = dice.choose(names)
        t = changed[name].clone()
        way = dice.below(5)
        if way == 0 and t.numel():
            t.view(torch.uint8).view(-1)[dice.below(t.nbytes)] = dice.byte()
        elif way == 1:
            t = t.reshape(-1)[: dice.below(t.numel() + 1)].clone()
        elif way == 2:
            t = t.to(dice.choose([torch.int32, torch.uint8, torch.float64, torch.bool]))
        elif way == 3 and t.numel():
            t.view(-1)[dice.below(t.numel())] = dice.choose([0, -1, 127])
        changed[name] = t
        if way == 4:
            changed.pop(name)
            names.remove(name)
    (path / CONFIG).write_text(json.dumps({**config, "quantization_config": about}))
    (path / WEIGHTS).write_bytes(save(changed))
    _read(path)


# ---- recipes ----

RECIPES = (
    b"model: m\nmethod: sparsegpt\nsparsity: 0.5\nbits: 4\ngroup: 128\nmodules:\n"
    b"  - match: down_proj\n    bits: 8\n  - match: 're:.*up_proj'\n    nm: '2:4'\n"
    b"calibration: {path: texts, tokens: 4096, window: 128, seed: 3, quotas: {en: 512}}\n",
    b"model: m\nmethod: gptq\nbits: 4\ndrop_layers: {count: 2, score: ppl}\nheal: {steps: 10}\n"
    b"evaluate: {path: texts}\nmax_ram: 4GiB\nembed_bits: 8\nskip: [lm_head]\n",
)
_YAML = (
    b"!!python/object/apply:os.system [x]", b"!!binary x", b"!!bool x", b"!!int ''", b"!!float x",
    b"!!timestamp x", b"!!set {a}", b"!!omap [a: 1]", b"&a ", b"*a", b"<<: *a", b"? ", b"- ",
    b": ", b"{", b"}", b"[", b"]", b"|\n", b">\n", b"%YAML 1.1\n---\n", b"\n...\n", b"!x ",
    b"2001-99-99", b"2001-01-01T00:00:00+99:99", b"1e999", b".nan", b"0b2", b"0x", b"1_000",
    b"190:20:30", b"~", b"null", b"\t", b"\xef\xbb\xbf", b"\x00", b"\xc2\x85", b"model", b"bits",
    b"modules", b"sparsity", b"weights: worst", b"9" * 5000, b"\xff\xfe", b"'", b'"\\ud800"',
)  # fmt: skip


def _recipe(folder: Path, dice: Dice) -> None:
    text = dice.choose(RECIPES)
    text = dice.rest() if dice.byte() % 8 == 7 else spliced(text, dice, _YAML)
    (folder / "r.yaml").write_bytes(text)
    with guarded(folder):
        Recipe.from_yaml(folder / "r.yaml")
    with guarded(folder):
        Recipe(**{"model": "m", **read_fields(folder / "r.yaml")})


# ---- texts, chats ----


def _texts(folder: Path, dice: Dice) -> None:
    suffix = dice.choose([".txt", ".jsonl", ".parquet"])
    lines = SENTENCES["ja"] + SENTENCES["es"]
    if suffix == ".parquet":
        held = io.BytesIO()
        way = dice.choose([{}, {"compression": "gzip"}, {"use_dictionary": False}])
        pq.write_table(pa.table({"text": lines, "n": range(6)}), held, **way)
        data = flipped(held.getvalue(), dice)
    elif suffix == ".jsonl":
        records = [json.dumps({"text": line, "n": 1}).encode() for line in lines]
        records[dice.below(6)] = json_file({"text": lines[0], "n": [{"a": 1}]}, dice)
        data = spliced(b"\n".join(records), dice)
    else:
        tokens = (b"\0", b"\xff", b"\xc3", b"\r\n", b"\r", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"\n")
        data = spliced("\n".join(lines).encode(), dice, tokens)
    for old in folder.iterdir():
        old.unlink()
    (folder / f"ja{suffix}").write_bytes(data)
    with guarded(folder):
        for documents in open_texts(folder, parallel=bool(dice.byte() % 2)).values():
            for text in documents:
                assert text.strip() and "\0" not in text and text.encode("utf-8")


_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _talker(folder: Path) -> tuple:
    talks = tokenizer()
    talks.chat_template = _TEMPLATE
    return folder, talks


def _chats(state: tuple, dice: Dice) -> None:
    folder, talks = state
    turns = [
        {"role": r, "content": t} for r, t in zip(("user", "assistant") * 2, "abcd", strict=True)
    ]
    lines = [json_file({"messages": turns}, dice) for _ in range(1 + dice.below(3))]
    (folder / "en.jsonl").write_bytes(b"\n".join(lines))
    with guarded(folder):
        if files := chat_files(folder):
            read_chats(files, talks, 16)


# ---- adapters, tokenizers ----


def _adapted(folder: Path) -> tuple:
    checkpoint = open_checkpoint(tiny.make(folder / "model", tiny.FAMILIES["llama"]))
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{stem}.lora_A.weight": torch.ones(2, 64),
        f"{stem}.lora_B.weight": torch.ones(64, 2),
    }
    (folder / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
              "layers_to_transform": [0], "rank_pattern": {"k_proj": 3}, "alpha_pattern": {"k": 1},
              "use_rslora": False, "bias": "none", "modules_to_save": None}  # fmt: skip
    return checkpoint, folder / "adapter", config, tensors


def _adapter(state: tuple, dice: Dice) -> None:
    checkpoint, folder, config, tensors = state
    (folder / "adapter_config.json").write_bytes(json_file(config, dice))
    data = save({k: t.clone() for k, t in tensors.items()})
    if dice.byte() % 2:
        data = flipped(data, dice)
    (folder / "adapter_model.safetensors").write_bytes(data)
    with guarded(folder):
        read_adapter(folder, checkpoint)


def _vocabulary(folder: Path) -> tuple:
    model = save_model(folder / "model")
    names = ("tokenizer.json", "tokenizer_config.json")
    return model, {name: json.loads((model / name).read_text()) for name in names}


def _tokenizer(state: tuple, dice: Dice) -> None:
    model, files = state
    hit = dice.choose(sorted(files))
    for name, document in files.items():
        data = json_file(document, dice) if name == hit else json.dumps(document).encode()
        (model / name).write_bytes(data)
    with guarded(model):
        load_tokenizer(model, 300)


TARGETS = [
    Target("config", _configs, _config, slow=8),
    Target("index", _sharded, _index, slow=4),
    Target("header", _single, _header, slow=4),
    Target("quantised", _quantised, _quantisation, slow=8),
    Target("recipe", lambda folder: folder, _recipe),
    Target("texts", lambda folder: folder, _texts),
    Target("chats", _talker, _chats, slow=4),
    Target("adapter", _adapted, _adapter, slow=2),
    Target("tokenizer", _vocabulary, _tokenizer, slow=16),
]
