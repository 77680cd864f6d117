"""What `distaya plan` predicts beside what `distaya compress` then takes: peak memory, bytes, time.

    python bench/plan.py [--out bench/results/plan.json] [--only nano-aya] [--readme]

Two random Cohere models of different size, made here, and the bundled nano-aya, several recipes
each. Peak memory is VmHWM of a fresh process that runs the command, file pages it mapped included.
--readme also writes the table in README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
from bench import harness  # noqa: E402

if __name__ == "__main__":
    harness.passive()

ASSETS = ROOT / "distaya_ext" / "assets"
NANO = ASSETS / "nano-aya"
TEXTS = ASSETS / "texts" / "calibration"

# hidden, intermediate, layers, vocabulary
MADE = {"random-1024": (1024, 2816, 4, 32000), "random-2048": (2048, 5632, 2, 64000)}

_DEFAULT = {"method": "sparsegpt", "nm": "2:4", "bits": 4}
_PLAIN = {**_DEFAULT, "quality": "plain"}
_RTN = {"method": "rtn", "bits": 4, "embed_bits": 8}
CASES: dict[str, dict[str, tuple[dict[str, Any], int]]] = {
    "nano-aya": {
        "default": (_DEFAULT, 16384),
        "high": ({**_DEFAULT, "quality": "high"}, 8192),
        "default, 704 MiB": ({**_DEFAULT, "max_ram": "704MiB"}, 16384),
        "rtn, embedding in 8 bits": (_RTN, 0),
    },
    "random-1024": {
        "default": (_DEFAULT, 5888),
        "plain": (_PLAIN, 5888),
        "plain, 1 GiB": ({**_PLAIN, "max_ram": "1GiB"}, 17664),
        "rtn, embedding in 8 bits": (_RTN, 0),
    },
    "random-2048": {
        "default": (_DEFAULT, 5888),
        "plain": (_PLAIN, 5888),
        "rtn, embedding in 8 bits": (_RTN, 0),
    },
}

_RUN = """
import sys
from distaya_ext.cli.app import main
try:
    main()
finally:
    with open("/proc/self/status") as file:  # ru_maxrss would include the parent's peak
        print(next(line for line in file if line.startswith("VmHWM")), file=sys.stderr)
"""


@dataclass(frozen=True)
class Row:
    """Bytes and seconds, predicted and measured. decided_by: the phase with the predicted peak."""

    model: str
    recipe: str
    tokens: int
    predicted: int
    measured: int
    decided_by: str
    spilled: bool
    output_predicted: int
    output: int
    seconds_predicted: float
    seconds: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured

    def to_dict(self) -> dict[str, Any]:
        seconds = self.seconds_predicted / self.seconds
        return {**asdict(self), "ratio": self.ratio, "seconds_ratio": seconds}


def make(folder: Path, sizes: tuple[int, int, int, int]) -> Path:
    """A random model in bfloat16 with nano-aya's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, CohereConfig

    hidden, intermediate, layers, vocabulary = sizes
    config = CohereConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        vocab_size=vocabulary, num_attention_heads=16, num_key_value_heads=4,
        max_position_embeddings=2048, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(NANO / name, folder / name)
    return folder


def measure(model: Path, recipe: Path, out: Path) -> tuple[int, float]:
    """Peak resident bytes and seconds of `distaya compress` in a process of its own."""
    command = ["compress", str(model), "--recipe", str(recipe), "--out", str(out), "--quiet"]
    start = time.perf_counter()
    quiet = {**os.environ, "DISTAYA_HISTORY": "off"}  # a measurement is no part of a history
    run = subprocess.run(
        [sys.executable, "-c", _RUN, *command],
        capture_output=True, text=True, check=False, env=quiet,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    if run.returncode:
        raise SystemExit(f"distaya {' '.join(command)} failed: {run.stderr.strip()[-500:]}")
    line = next(line for line in run.stderr.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024, seconds


def row(name: str, model: Path, recipe_name: str, work: Path) -> Row:
    """Plan a case, run it, and put the two side by side."""
    from distaya_ext import Recipe, plan

    fields, tokens = CASES[name][recipe_name]
    calibration = {"path": str(TEXTS), "tokens": max(tokens, 256), "window": 256}
    recipe = Recipe(model=str(model), **fields, calibration=calibration)
    file, out = work / "recipe.yaml", work / "out"
    recipe.to_yaml(file)
    planned = plan(model, recipe)
    measured, seconds = measure(model, file, out)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    shutil.rmtree(out)
    return Row(
        name, recipe_name, planned.tokens, planned.memory.peak, measured, planned.memory.worst,
        planned.memory.spilled, planned.output, size, planned.time.seconds, seconds,
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    """The Markdown table."""
    lines = [
        "| model | recipe | calibration tokens | predicted | measured | ratio | decided by |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for each in rows:
        sizes = " | ".join(f"{n / 2**20:.0f} MiB" for n in (each.predicted, each.measured))
        lines.append(
            f"| {each.model} | {each.recipe} | {each.tokens} | {sizes} | {each.ratio:.2f} | "
            f"{each.decided_by} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", action="append", choices=list(CASES))
    parser.add_argument("--readme", action="store_true", help="rewrite the table in README.md")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="distaya-") as folder:
        work = Path(folder)
        for name in args.only or CASES:
            model = NANO if name not in MADE else make(work / name, MADE[name])
            for recipe in CASES[name]:
                rows.append(row(name, model, recipe, work))
                told = rows[-1]
                print(
                    f"{name:12} {recipe:26} {told.predicted / 2**20:7.0f} MiB predicted, "
                    f"{told.measured / 2**20:7.0f} measured, {told.ratio:.3f}; output "
                    f"{told.output_predicted}/{told.output}; {told.seconds_predicted:.0f} s "
                    f"predicted, {told.seconds:.0f} s; {told.decided_by}",
                    flush=True,
                )
                if args.out is not None:  # after every row: a run takes minutes
                    found = {"rows": [each.to_dict() for each in rows], "made": MADE}
                    found["machine"] = harness.machine()
                    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.readme:
        harness.write_table(ROOT / "README.md", "plan", table(rows))
    worst = max(rows, key=lambda each: abs(each.ratio - 1))
    print(f"furthest from what was measured: {worst.ratio:.3f} ({worst.model}, {worst.recipe})")


if __name__ == "__main__":
    main()
