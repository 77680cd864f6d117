"""A tiny model that has learned its texts, the texts, and a quality bench's arguments for both."""

import random
import sys
from pathlib import Path

import torch
from speaking import SENTENCES, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(Path(__file__).resolve().parent.parent))
from bench import plain

PATTERNS = ("2:4", "2:4 + int4", "int3")
SEEDS = (0, 1)


def save_texts(folder: Path, seed: int, documents: int = 6) -> Path:
    """Documents of shuffled sentences, so that two seeds share none."""
    folder.mkdir(parents=True)
    for lang, lines in SENTENCES.items():
        rng = random.Random(f"{seed}{lang}")
        each = [" ".join(rng.choices(lines, k=8)) + f" {seed}{n}" for n in range(documents)]
        (folder / f"{lang}.txt").write_text("\n".join(each) + "\n", encoding="utf-8")
    return folder


def train(folder: Path, texts: Path) -> None:
    """Teach the model the sentences a little: of a random one compression may lower the loss."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = plain.drawn(plain.read_folder(texts), tokenizer, 12, 32, 0).ids
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    model.to(torch.bfloat16).save_pretrained(folder)


def arguments(root: Path) -> list[str]:
    """Arguments of every call: model (bf16, as scales are), texts, few windows, small groups."""
    calibration = save_texts(root / "texts" / "train", 1)
    train(save_model(root / "tiny"), calibration)
    test = save_texts(root / "texts" / "test", 2)
    found = ["--model", root / "tiny", "--calibration", calibration, "--test", test]
    sizes = ["--windows", 8, "--window", 32, "--test-windows", 3, "--group", 32, "--seeds", *SEEDS]
    return [str(word) for word in (*found, *sizes, "--patterns", *PATTERNS)]
