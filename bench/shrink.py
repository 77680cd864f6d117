"""What students inherit: nats per token before any training, against random weights and choices.

    python bench/shrink.py --model nano-aya --calib train/ --texts valid/ [--json FILE]

Each student is cut out of the model, scored on the same windows and thrown away. Half of the MLP,
a quarter of the channels, half of the heads or a quarter of the layers goes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from distaya_ext import read_texts
from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.evaluate import Evaluation, Loaded, cut_windows, evaluate_loaded, load
from distaya_ext.students import make_student
from distaya_ext.students.shape import own_shape

SEEDS = (0, 1, 2)  # of random choices


def cases(model: str) -> dict[str, dict[str, Any]]:
    """What is cut, by the name it is shown under."""
    own = own_shape(open_checkpoint(model))
    mlp, wide = {"intermediate": own.intermediate // 2}, {"hidden": own.hidden * 3 // 4}
    heads = {"heads": own.heads // 2}
    fewer = {"layers": len(own.layers) * 3 // 4}
    found: dict[str, dict[str, Any]] = {}
    for what, sizes in (("MLP 1/2", mlp), ("hidden 3/4", wide), ("heads 1/2", heads)):
        for by in ("activation", "magnitude"):
            found[f"{what} by {by}"] = {**sizes, "by": by}
        for seed in SEEDS:
            found[f"{what} by chance {seed}"] = {**sizes, "by": "random", "seed": seed}
    for by in ("spread", "bi", "kl"):
        found[f"layers 3/4 by {by}"] = {**fewer, "layers_by": by}
    return found


def fresh(folder: Path) -> Loaded:
    """A model of the folder's shape with the weights its own classes start with."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    inherited = load(folder)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return Loaded("random", model.float().eval(), inherited.tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", required=True, help="texts that decide what stays")
    parser.add_argument("--texts", required=True, help="texts that are scored")
    parser.add_argument("--tokens", type=int, default=5888)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    calib, own = read_texts(asked.calib), load(asked.model)
    samples = cut_windows(read_texts(asked.texts), own.tokenizer, tokens=asked.tokens)
    rows: dict[str, float] = {}

    def tell(name: str, found: Evaluation) -> None:
        rows[name] = found.nll
        worst = found.worst
        print(f"{name:28} {found.nll:8.4f} nats/token, worst {worst.language} {worst.nll:.3f}")

    tell("the teacher", evaluate_loaded([own], samples, window=256)[0])
    for name, sizes in cases(asked.model).items():
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "student"
            made = make_student(asked.model, out, texts=calib, **sizes)
            tell(name, evaluate_loaded([load(out)], samples, window=256)[0])
            if made.norms:
                worst = max(fit.error for fit in made.norms.values())
                print(f"{'':28} norms lose up to {100 * worst:.1f} % of their output's square")
            if name.endswith(("by activation", "by spread")):
                what = name.rpartition(" by ")[0]
                new = evaluate_loaded([fresh(out)], samples, window=256)[0]
                tell(f"{what}, random weights", new)
    if asked.json is not None:
        asked.json.write_text(json.dumps({"model": asked.model, "nll": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
