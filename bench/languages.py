"""What calibration weights are worth to the language that loses most.

    python bench/languages.py --model MODEL --calibration TRAIN --test TEST [--json OUT] [--readme]

The same 2:4 pruning at the same number of calibration tokens, of English alone, of all languages
with equal weights, and of all with weights that follow the loss ("worst"); every calibration seed
is a draw of its own. Judged as bench/quality.py judges, on windows that calibrated nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from bench import harness  # noqa: E402

if __name__ == "__main__":
    harness.passive()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from bench.plain import Drawn, drawn, read_folder  # noqa: E402
from bench.quality_score import Base, score  # noqa: E402
from bench.quality_stats import Draws, interval  # noqa: E402
from bench.quality_texts import test_windows  # noqa: E402

ARMS = {"English alone": "proportional", "equal weights": "equal", "worst": "worst"}
Deltas = dict[str, np.ndarray]  # per language, of every test window: nats per token lost


def judged(model: Path, base: Base, windows: Drawn, weights: str) -> Deltas:
    """Loss of every test window after 2:4 on these calibration windows."""
    from distaya_ext import Recipe, compress, load

    recipe = Recipe(
        model=str(model), method="sparsegpt", nm="2:4", calibration={"weights": weights}
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "compressed"
        compress(model, out, recipe, texts=windows)
        found = score(load(out, dtype=torch.float32, exact=True), base)
    return {lang: np.array(one.windows) for lang, one in found.languages.items()}


def measure(args: argparse.Namespace) -> dict[str, list[Deltas]]:
    """Per arm the deltas of every seed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    base = Base(dense, test_windows(args.test, tokenizer, args.window, args.test_windows))
    texts = read_folder(args.calibration)
    found: dict[str, list[Deltas]] = {arm: [] for arm in ARMS}
    for seed in args.seeds:
        for arm, weights in ARMS.items():
            own = {"en": texts["en"]} if arm == "English alone" else texts
            windows = drawn(own, tokenizer, args.windows, args.window, seed)
            found[arm].append(judged(args.model, base, windows, weights))
            worst, lang = worst_of(found[arm][-1:])
            print(f"{arm:14} seed {seed}  worst language {lang} {worst:+.4f}", flush=True)
    return found


def pooled(runs: list[Deltas]) -> Deltas:
    """Of every test window the mean over seeds."""
    return {lang: np.mean([run[lang] for run in runs], axis=0) for lang in runs[0]}


def worst_of(runs: list[Deltas]) -> tuple[float, str]:
    """The largest loss of a language, and which one that is."""
    means = {lang: float(values.mean()) for lang, values in pooled(runs).items()}
    lang = max(means, key=means.__getitem__)
    return means[lang], lang


def table(found: dict[str, list[Deltas]]) -> str:
    """Markdown: worst and mean language of each arm; ratios of the worst, paired by test window."""
    deltas = {arm: pooled(runs) for arm, runs in found.items()}
    draws = Draws({lang: len(v) for lang, v in next(iter(deltas.values())).items()})
    samples = {
        arm: np.max([draws.language(lang, v) for lang, v in each.items()], axis=0)
        for arm, each in deltas.items()
    }
    lines = [
        "| calibration | worst language | mean | worst, x English alone | x equal weights |",
        "|---|--:|--:|--:|--:|",
    ]
    for arm, runs in found.items():
        worst, lang = worst_of(runs)
        mean = float(np.mean([v.mean() for v in deltas[arm].values()]))
        cells = [f"{lang} {worst:+.3f}", f"{mean:+.3f}"]
        for other in ("English alone", "equal weights"):
            low, high = interval(samples[arm] / samples[other])
            ratio = worst / worst_of(found[other])[0]
            same = other == arm
            cells.append("" if same else f"{ratio:.3f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    harness.add_sources(parser, "--calibration")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="calibration draws")
    parser.add_argument("--windows", type=int, default=128, help="calibration windows in all")
    parser.add_argument("--window", type=int, default=256, help="tokens in a window")
    parser.add_argument("--test-windows", type=int, help="per language (default: all)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--readme", action="store_true", help="rewrite the table in README.md")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    args = arguments(words)
    torch.set_num_threads(args.threads)
    found = measure(args)
    text = table(found)
    note = (
        f"{args.model.name}, 2:4 at quality default; {args.windows} windows of {args.window} "
        f"tokens calibrate (seeds {', '.join(map(str, args.seeds))}). Loss in nats per token of "
        "test text, 95 % paired bootstrap over test windows in which the worst language is chosen "
        "anew."
    )
    print(f"{text}\n\n{note}")
    if args.json:
        kept = {
            arm: [{lang: [round(x, 5) for x in v] for lang, v in run.items()} for run in runs]
            for arm, runs in found.items()
        }
        args.json.write_text(json.dumps({"deltas": kept, "note": note}) + "\n", encoding="utf-8")
    if args.readme:
        harness.write_table(ROOT / "README.md", "languages", f"{text}\n\n{note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
