"""How much of what compression lost some minutes of distillation bring back.

    python bench/healing.py --model MODEL --train TRAIN --test TEST [--json OUT] [--readme]

Students of MODEL: 2:4 + int4 with LoRA beside the codes, the same with its scales and norms
learning alone, and one with a quarter of its layers dropped by KL (dense, LoRA is merged). Each
learns from MODEL on TRAIN; calibration is on TRAIN too. Judged before and after on windows of TEST,
which nothing has seen. Codes and zeros of the healed folder are compared with the compressed one's.
With --resume the students that are not asked for are those of an earlier --json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from bench import harness  # noqa: E402

if __name__ == "__main__":
    harness.passive()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from bench.plain import drawn, read_folder  # noqa: E402
from bench.quality_score import Base, Scores, score  # noqa: E402
from bench.quality_stats import Draws, interval  # noqa: E402
from bench.quality_texts import test_windows  # noqa: E402

PACKED, SCALES = "2:4 + int4, LoRA beside", "2:4 + int4, scales and norms learn"
STUDENTS = (PACKED, SCALES, "a quarter of the layers dropped")


@dataclass(frozen=True)
class Healed:
    """One student: scores before and after, and what it took.

    bits: per weight of the Linears, before and after, what stays beside counted. unchanged: packed
    tensors and zeros that were compared and found equal.
    """

    student: str
    before: Scores
    after: Scores
    minutes: float
    tokens: int
    bits: tuple[float, float]
    unchanged: int


def student_of(args: argparse.Namespace, which: str, windows, out: Path) -> None:
    """Compress MODEL into `out`."""
    from distaya_ext import Recipe, compress
    from distaya_ext.checkpoint import open_checkpoint
    from distaya_ext.influence.choose import choose
    from distaya_ext.influence.spec import DropSpec

    if which in (PACKED, SCALES):
        recipe = Recipe(model=str(args.model), method="sparsegpt", nm="2:4", bits=4, group=128)
        compress(args.model, out, recipe, texts=windows)
        return
    choice = choose(open_checkpoint(args.model), windows, DropSpec(share=0.25))
    print(f"layers dropped: {choice.dropped}", flush=True)
    recipe = Recipe(model=str(args.model), method="dense", drop_layers=choice.dropped)
    compress(args.model, out, recipe)


def heal(args: argparse.Namespace, which: str, windows, base: Base, root: Path) -> Healed:
    """Compress, judge, distil, judge again."""
    from distaya_ext.train.distill import distill
    from distaya_ext.train.healing import HEALING
    from distaya_ext.train.spec import TrainSpec

    before, after = root / "before", root / "after"
    student_of(args, which, windows, before)
    kind = {"train": "scales", "also": ["norms"]} if which == SCALES else {}
    spec = TrainSpec(
        **(HEALING | kind),
        steps=args.steps,
        tokens=max(args.steps * 2048, 1 << 17),
        evaluate_every=max(1, args.steps // 4),
        save_every=max(1, args.steps // 2),
    )
    scored = judged(before, base)
    began = time.perf_counter()
    trained = distill(args.model, before, after, args.train, spec)
    minutes = (time.perf_counter() - began) / 60
    found = Healed(
        which,
        scored,
        judged(after, base),
        minutes,
        trained.course.tokens,
        (bits(before), bits(after)),
        unchanged(before, after, which == SCALES),
    )
    print(f"{which}: {minutes:.1f} minutes, {found.tokens} tokens", flush=True)
    return found


def judged(folder: Path, base: Base) -> Scores:
    """Loss on the test windows, activations exact."""
    from distaya_ext import load

    return score(load(folder, dtype=torch.float32, exact=True), base)


def bits(folder: Path) -> float:
    """Bits per weight of the decoder layers' matrices, low-rank factors beside them counted."""
    from distaya_ext.checkpoint import open_checkpoint
    from distaya_ext.checkpoint.reader import read_header

    held = open_checkpoint(folder, packed=True)
    layers = held.architecture.layers + "."
    size = sum(entry.nbytes for name, entry in held.entries.items() if name.startswith(layers))
    for path in (folder / "adapter").glob("*.safetensors"):
        size += sum(entry.nbytes for entry in read_header(path).values())
    from distaya_ext.models.skeleton import build_skeleton

    model = build_skeleton(held.config, torch.float32)
    count = sum(p.numel() for name, p in model.named_parameters() if name.startswith(layers))
    return 8 * size / count


def unchanged(before: Path, after: Path, scales: bool) -> int:
    """Packed tensors that are the same bytes, and others (dense ones, and scales that learnt) with
    the same zeros; SystemExit if any differs.
    """
    from distaya_ext.checkpoint import open_checkpoint

    old, new = (open_checkpoint(folder, packed=True) for folder in (before, after))
    layers, same = old.architecture.layers + ".", 0
    if old.entries.keys() != new.entries.keys():
        raise SystemExit("the healed folder holds other tensors than the compressed one")
    for name in (name for name in old.entries if name.startswith(layers)):
        a, b = old.read([name])[name], new.read([name])[name]
        packed = any(name.startswith(f"{module}.") for module in old.stored)
        packed &= not (scales and name.endswith("_scale"))
        if not (torch.equal(a, b) if packed else torch.equal(a == 0, b == 0)):
            raise SystemExit(f"{name} of the healed folder differs from the compressed one")
        same += 1
    return same


def row(record: dict) -> str:
    """A line of the table: losses in nats per token, and the share that came back."""
    lost, left = (
        {lang: np.array(each) for lang, each in record["deltas"][when].items()}
        for when in ("before", "after")
    )
    draws = Draws({lang: len(v) for lang, v in lost.items()})
    a, b = (float(np.mean([v.mean() for v in each.values()])) for each in (lost, left))
    low, high = interval(1 - draws.mean(left) / draws.mean(lost))
    worst = max(left, key=lambda lang: left[lang].mean())
    share = {k: 1 - left[k].mean() / lost[k].mean() for k in left}
    least = min(share, key=share.__getitem__)
    cells = [
        record["student"],
        f"{a:+.4f}",
        f"{b:+.4f}",
        f"{100 * (1 - b / a):.0f} % [{100 * low:.0f}, {100 * high:.0f}]",
        f"{least} {100 * share[least]:.0f} %",
        f"{worst} {left[worst].mean():+.3f}",
        "{:.3f} → {:.3f}".format(*record["kl"]),
        "{:.2f} → {:.2f}".format(*record["bits"]),
        f"{record['minutes']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    harness.add_sources(parser, "--train")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=STUDENTS)
    parser.add_argument("--windows", type=int, default=128, help="calibration windows in all")
    parser.add_argument("--test-windows", type=int, help="per language (default: all)")
    parser.add_argument("--steps", type=int, default=700, help="of 2048 tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--resume", action="store_true", help="keep other students of --json")
    parser.add_argument("--readme", action="store_true", help="rewrite the table in README.md")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args = arguments(words)
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    base = Base(dense, test_windows(args.test, tokenizer, 256, args.test_windows))
    windows = drawn(read_folder(args.train), tokenizer, args.windows, 256, 0)
    nll = sum(float(x.mean()) for x in base.nll.values()) / len(base.nll)
    held = json.loads(args.json.read_text())["rows"] if args.resume else []
    kept = {one["student"]: one for one in held if one["student"] not in args.students}
    for which in args.students:
        with tempfile.TemporaryDirectory() as folder:
            kept[which] = record(heal(args, which, windows, base, Path(folder)))
    rows = [kept[which] for which in STUDENTS if which in kept]
    lines = [
        "| student | lost | after healing | came back | least in | worst language | KL | "
        "bits/weight | minutes |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        *map(row, rows),
    ]
    note = (
        f"{args.model.name}, dense NLL {nll:.4f} nats per token of test text; {args.steps} steps "
        f"of 2048 tokens with the defaults of `distaya heal`, {args.threads} threads. 95 % paired "
        "bootstrap over test windows. Minutes are those of the whole distillation, reading and "
        "writing included; bits per weight count what stays beside. "
        f"{', '.join(str(one['unchanged']) for one in rows)} tensors were compared with the "
        "compressed folder's: codes and zeros are the same."
    )
    text = "\n".join(lines) + f"\n\n{note}"
    print(text)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if type(v) is int}
        about = {"settings": settings, "dense_nll": nll, "machine": harness.machine()}
        args.json.write_text(json.dumps({**about, "rows": rows}) + "\n", encoding="utf-8")
    if args.readme:
        harness.write_table(ROOT / "README.md", "healing", text)
    return 0


def record(found: Healed) -> dict:
    """What a line of the table is made of, per test window."""
    scored = {"before": found.before, "after": found.after}
    return {
        "student": found.student,
        "minutes": found.minutes,
        "tokens": found.tokens,
        "bits": found.bits,
        "unchanged": found.unchanged,
        "kl": [round(s.mean("kl"), 5) for s in scored.values()],
        "deltas": {
            when: {lang: [round(x, 5) for x in one.windows] for lang, one in s.languages.items()}
            for when, s in scored.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
