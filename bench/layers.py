"""Which layers each score drops, and how many better choices there would have been.

    python bench/layers.py --model MODEL --train TRAIN --test TEST [--drop 2] [--json OUT] [--write]

The scores are measured on windows of TRAIN. Every set of so many layers is then left out and judged
on windows of TEST, so that each choice has its place among all there are (few layers only: there
are 28 pairs of 8 and 496 of 32). --write puts the table into docs/layers.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from bench import harness  # noqa: E402

if __name__ == "__main__":
    harness.passive()

import torch  # noqa: E402

from bench.plain import drawn, read_folder  # noqa: E402
from bench.quality_score import Base, Scores, score  # noqa: E402
from bench.quality_texts import test_windows  # noqa: E402

Sets = dict[tuple[int, ...], Scores]


def chosen(args: argparse.Namespace, windows) -> dict[str, tuple[int, ...]]:
    """The layers that go, by score; kl and ppl greedy and at once."""
    from distaya_ext.checkpoint import open_checkpoint
    from distaya_ext.influence.choose import Study
    from distaya_ext.influence.spec import SCORES, DropSpec

    specs = {f"{s}, greedy": DropSpec(count=args.drop, score=s) for s in ("kl", "ppl")}
    specs |= {s: DropSpec(count=args.drop, score=s, greedy=False) for s in SCORES}
    study = Study(open_checkpoint(args.model), windows, SCORES, run=args.drop)
    scores, choices = study.go(list(specs.values()))
    for name in SCORES:
        print(f"{name:8} least first: {', '.join(map(str, scores.ranking(name)))}", flush=True)
    return {name: tuple(c.dropped) for name, c in zip(specs, choices, strict=True)}


def judge_all(model, base: Base, count: int) -> Sets:
    """The loss of every set of `count` layers. model is the whole one."""
    from distaya_ext.models import describe
    from distaya_ext.models.depth import remove_layers

    depth, found = model.config.num_hidden_layers, {}
    for gone in combinations(range(depth), count):
        left = [layer for layer in range(depth) if layer not in gone]
        shallower = copy.deepcopy(model)
        remove_layers(shallower, describe(model.config), left)
        found[gone] = score(shallower, base)
    return found


def table(choices: dict[str, tuple[int, ...]], sets: Sets) -> str:
    """Markdown: what each choice loses, and its place among all sets."""
    order = sorted(sets, key=lambda gone: sets[gone].mean("delta"))
    by_set: dict[tuple[int, ...], list[str]] = {}
    for name, gone in choices.items():
        by_set.setdefault(gone, []).append(name)
    by_set.setdefault(order[0], []).append("the best there is")
    lines = [
        "| chosen by | layers | delta NLL | worst language | KL | place |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for gone in sorted(by_set, key=order.index):
        found = sets[gone]
        worst = max(found.languages, key=lambda lang: found.languages[lang].delta)
        lines.append(
            f"| {'; '.join(by_set[gone])} | {', '.join(map(str, gone))} | "
            f"{found.mean('delta'):+.3f} | {worst} {found.languages[worst].delta:+.2f} | "
            f"{found.mean('kl'):.3f} | {order.index(gone) + 1} of {len(order)} |"
        )
    return "\n".join(lines)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    harness.add_sources(parser, "--train")
    parser.add_argument("--drop", type=int, default=2, help="how many layers go")
    parser.add_argument(
        "--windows", type=int, default=46, help="windows the scores are measured on"
    )
    parser.add_argument("--window", type=int, default=256, help="tokens in a window")
    parser.add_argument("--test-windows", type=int, default=2, help="per language")
    parser.add_argument("--seed", type=int, default=0, help="draw of the windows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--write", action="store_true", help="rewrite the table in docs/layers.md")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args = arguments(words)
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    test = test_windows(args.test, tokenizer, args.window, args.test_windows)
    base = Base(copy.deepcopy(model), test)
    texts = read_folder(args.train)
    choices = chosen(args, drawn(texts, tokenizer, args.windows, args.window, args.seed))
    sets = judge_all(model, base, args.drop)
    note = (
        f"{args.model.name}: scores on {args.windows} windows of {args.window} tokens, judged on "
        f"{sum(map(len, test.values()))} others in {len(test)} languages; nats per token."
    )
    text = f"{table(choices, sets)}\n\n{note}"
    print(text)
    if args.json:
        plain = {", ".join(map(str, gone)): round(s.mean("delta"), 5) for gone, s in sets.items()}
        args.json.write_text(json.dumps({"choices": choices, "delta": plain}) + "\n")
    if args.write:
        harness.write_table(ROOT / "docs" / "layers.md", "layers", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
