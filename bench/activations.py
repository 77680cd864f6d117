"""What 8-bit activations cost on top of compression: nano-aya, bundled texts, nats per token.

    python bench/activations.py [--readme]

Each recipe is compressed once and evaluated twice against the dense model: exact, and with the
activations rounded to 8 bits as the CPU kernels do by default.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from bench import harness  # noqa: E402

if __name__ == "__main__":
    harness.passive()

import distaya_ext  # noqa: E402
from distaya_ext import Recipe, compress, evaluate, read_texts  # noqa: E402

ASSETS = Path(distaya_ext.__file__).parent / "assets"
RECIPES = {
    "int4": {"method": "gptq", "bits": 4},
    "int4, embedding int8": {"method": "gptq", "bits": 4, "embed_bits": 8},
    "2:4 + int4, embedding int8": {"nm": "2:4", "bits": 4, "embed_bits": 8},
    "int3, embedding int8": {"method": "gptq", "bits": 3, "embed_bits": 8},
}


def table(tokens: int = 20000, window: int = 128) -> str:
    """The Markdown table; tokens and window are those of the calibration."""
    model = ASSETS / "nano-aya"
    spec = {"path": str(ASSETS / "texts" / "calibration"), "tokens": tokens, "window": window}
    texts = read_texts(ASSETS / "texts" / "evaluation")
    lines = ["| nano-aya | compressed, exact | rounded activations, on top |", "|---|--:|--:|"]
    with tempfile.TemporaryDirectory() as folder:
        for index, (name, fields) in enumerate(RECIPES.items()):
            out = Path(folder) / str(index)
            compress(model, out, Recipe(model=str(model), calibration=spec, **fields))
            exact, rounded = (
                evaluate(out, texts, against=model, exact=flag, continuations=0)
                for flag in (True, False)
            )
            cost, more = exact.nll - exact.base_nll, rounded.nll - exact.nll
            lines.append(f"| {name} | {cost:+.4f} | {more:+.4f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--readme", action="store_true", help="rewrite the table in README.md")
    args = parser.parse_args()
    found = table()
    print(found)
    if args.readme:
        harness.write_table(ROOT / "README.md", "activations", found)


if __name__ == "__main__":
    main()
