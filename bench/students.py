"""A student with a tokenizer of its own, taught by nano-aya: text alone against the aligned route.

    python bench/students.py [--json FILE] [--readme] [--model M --train T --test T]

A random Qwen2 model and a byte-level BPE made of the training text. Both arms start from the same
numbers, see the same rows in the same order for the same steps, and end with the parameters of
their lowest held-out loss. What is told is the surprise on the test text in bits per byte, which no
tokenizer changes, and the difference with an interval over windows (each averaged over the seeds).
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from bench import harness  # noqa: E402

if __name__ == "__main__":
    harness.passive()

import numpy as np  # noqa: E402
import torch  # noqa: E402

import distaya_ext  # noqa: E402
from distaya_ext import read_texts  # noqa: E402
from distaya_ext.evaluate import cut_windows, load  # noqa: E402
from distaya_ext.evaluate.score import score  # noqa: E402
from distaya_ext.evaluate.statistics import interval  # noqa: E402
from distaya_ext.train.align import Vocabulary  # noqa: E402
from distaya_ext.train.finetune import CrossEntropy  # noqa: E402
from distaya_ext.train.fit import fit  # noqa: E402
from distaya_ext.train.pairs import paired_data  # noqa: E402
from distaya_ext.train.route import choose_route  # noqa: E402
from distaya_ext.train.spans import SpanObjective  # noqa: E402
from distaya_ext.train.spec import TrainSpec  # noqa: E402

ASSETS = Path(distaya_ext.__file__).parent / "assets"
END = "<|endoftext|>"
ARMS = ("text alone", "aligned")


@dataclass
class Row:
    """One run: bits per byte of test text and what training it took."""

    arm: str
    seed: int
    bits_per_byte: float
    best_step: int
    seconds: float
    windows: list[float] = field(default_factory=list)  # nats of each test window


def tokenizer_of(texts: dict[str, list[str]], size: int):
    """A byte-level BPE as Qwen2 has it (NFC, no BOS) of `size` tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.normalizer = normalizers.NFC()
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bare.train_from_iterator((text for found in texts.values() for text in found), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token=END, pad_token=END)


def student_of(vocabulary: int, hidden: int, layers: int, seed: int) -> torch.nn.Module:
    """A random Qwen2 model, the head tied to the embedding."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def chosen(texts: dict[str, list[str]], languages: str | None) -> dict[str, list[str]]:
    """The languages named, "en,fr"; all without a name."""
    return texts if languages is None else {lang: texts[lang] for lang in languages.split(",")}


def run(args: argparse.Namespace) -> tuple[list[Row], dict]:
    """Every arm with every seed, and what else the table tells."""
    teacher = load(args.model)
    texts = chosen(read_texts(args.train), args.languages)
    tokenizer = tokenizer_of(texts, args.vocabulary)
    spec = TrainSpec(
        train="full",
        also=["norms", "embeddings"],
        window=args.window,
        batch_tokens=args.batch_tokens,
        steps=args.steps,
        evaluate_every=max(1, args.steps // 8),
        save_every=args.steps,
        learning_rate=args.learning_rate,
        precision="float32",
        held_out=0.1,
        tokens=args.tokens,
    )
    route = choose_route(teacher.tokenizer, tokenizer, spec)
    print(route.sentence, flush=True)
    training, held_out, pairs = paired_data(texts, teacher.tokenizer, tokenizer, spec)
    objectives = {
        "text alone": CrossEntropy(),
        "aligned": SpanObjective(teacher.model, pairs, route.loss),
    }
    tests = chosen(read_texts(args.test), args.languages)
    samples = cut_windows(tests, tokenizer, window=args.window, tokens=args.test_tokens)
    windows = [row for sample in samples for row in sample.rows]
    strings = Vocabulary(tokenizer).strings
    ends = set(tokenizer.all_special_ids)
    lengths = [0 if i in ends else len(string or b"") for i, string in enumerate(strings)]
    sizes = np.array([sum(lengths[i] for i in row[1:].tolist()) for row in windows], np.float64)
    rows = []
    for seed in range(args.seeds):
        for arm in ARMS:
            model = student_of(len(tokenizer), args.hidden, args.layers, seed)
            start = time.monotonic()
            with tempfile.TemporaryDirectory() as work:
                seeded = spec.model_copy(update={"seed": seed, "loss": route.loss})
                course = fit(model, training, held_out, objectives[arm], seeded, Path(work))
            spent = time.monotonic() - start
            nats = score([model.eval()], windows)[0].nll
            bits = float(nats.sum() / sizes.sum() / math.log(2))
            rows.append(Row(arm, seed, bits, course.best_step, round(spent, 1), nats.tolist()))
            print(f"seed {seed}, {arm}: {bits:.4f} bits/byte, {spent:.0f} s", flush=True)
    about = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "languages": sorted(texts),
        "training_tokens": int(training.mask.sum()),
        "test_windows": len(windows),
        "test_bytes": int(sizes.sum()),
        "steps": args.steps,
        "batch_tokens": args.batch_tokens,
        "vocabulary": len(tokenizer),
        "sentence": route.sentence,
        "gains": gains(rows, sizes),
    }
    return rows, about


def gains(rows: list[Row], sizes: np.ndarray) -> dict[str, list[float]]:
    """Bits per byte the aligned route saves: of each seed, and of the mean over seeds ("all"), as
    [gain, low, high].
    """
    saved = {}
    for seed in sorted({row.seed for row in rows}):
        nats = {row.arm: np.array(row.windows) for row in rows if row.seed == seed}
        saved[str(seed)] = (nats["text alone"] - nats["aligned"]) / math.log(2)
    saved["all"] = np.mean(list(saved.values()), axis=0)
    return {
        name: [float(found.sum() / sizes.sum()), *(interval(found, sizes) or (math.nan,) * 2)]
        for name, found in saved.items()
    }


def table(rows: list[Row], about: dict) -> str:
    """Markdown: one line a seed and one of their mean."""
    lines = [
        f"A student of {about['parameters'] / 1e6:.2f} M parameters and {about['vocabulary']} "
        f"tokens of its own; {about['training_tokens']} tokens of text in "
        f"{len(about['languages'])} languages, {about['steps']} steps of {about['batch_tokens']}:",
        "",
        "| seed | text alone, bits/byte | aligned | saved (95 %) |",
        "|---|--:|--:|--:|",
    ]
    for name, (gain, low, high) in about["gains"].items():
        each = [
            np.mean(
                [r.bits_per_byte for r in rows if r.arm == arm and name in ("all", str(r.seed))]
            )
            for arm in ARMS
        ]
        label = "mean" if name == "all" else name
        saved = f"{gain:.3f} ({low:.3f} to {high:.3f})"
        lines.append(f"| {label} | {each[0]:.3f} | {each[1]:.3f} | {saved} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ASSETS / "nano-aya"), help="the teacher")
    parser.add_argument("--train", default=str(ASSETS / "texts" / "calibration"))
    parser.add_argument("--test", default=str(ASSETS / "texts" / "evaluation"))
    parser.add_argument("--languages", help="only these, as en,fr,de")
    parser.add_argument("--tokens", type=int, help="of training text, equally in each language")
    parser.add_argument("--test-tokens", type=int, help="of test text, likewise")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--window", type=int, default=96)
    parser.add_argument("--batch-tokens", type=int, default=768)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--readme", action="store_true", help="rewrite the table in README.md")
    args = parser.parse_args()
    rows, about = run(args)
    found = table(rows, about)
    print(found)
    if args.json:
        for row in rows:
            row.windows = [round(nats, 3) for nats in row.windows]
        harness.save(args.json, rows, **about)
    if args.readme:
        harness.write_table(ROOT / "README.md", "students", found)


if __name__ == "__main__":
    main()
