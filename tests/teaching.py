"""A tiny teacher, students made from it, and a training short enough for a test."""

import json
from types import SimpleNamespace

import speaking
import torch
from transformers import AutoModelForCausalLM, CohereConfig, CohereForCausalLM

from distaya_ext.compress import compress
from distaya_ext.recipe import Recipe
from distaya_ext.train.events import Notice
from distaya_ext.train.spec import LossSpec, TrainSpec

LAYERS, DROPPED = 4, [1, 2]
WINDOW = 16


def save(folder, seed=0, **fields):
    """A Cohere model of four layers with the tokenizer of speaking.py."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "logit_scale": 1.0, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0,
    }  # fmt: skip
    CohereForCausalLM(CohereConfig(**sizes | fields)).save_pretrained(folder)
    speaking.tokenizer().save_pretrained(folder)
    return folder


def make(root):
    """The teacher, texts, and the teacher without two layers and as 2:4 with 4 bits."""
    teacher, texts = save(root / "teacher"), speaking.save_texts(root / "texts", repeat=40)
    compress(teacher, root / "dropped", Recipe(model="t", method="dense", drop_layers=DROPPED))
    packed = Recipe(model="t", method="magnitude", nm="2:4", bits=4, group=32)
    compress(teacher, root / "packed", packed)
    names = ("dropped", "packed")
    return SimpleNamespace(teacher=teacher, texts=texts, **{name: root / name for name in names})


def spec(loss=None, **fields):
    short = {
        "steps": 20, "batch_tokens": 8 * WINDOW, "window": WINDOW, "learning_rate": 1e-2,
        "precision": "float32", "evaluate_every": 10, "held_out": 0.1, "rank": 4,
    }  # fmt: skip
    return TrainSpec(**short | fields, loss=LossSpec(**loss or {}))


def record(out):
    return json.loads((out / "training.json").read_text(encoding="utf-8"))


def told(events):
    return [event.message for event in events if isinstance(event, Notice)]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
