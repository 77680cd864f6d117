"""Quality of every method on a real model: NLL per token before and after, textbook beside ours.

    python bench/quality.py --calibration TRAIN --test TEST [--model MODEL] [--json OUT] [--readme]

TRAIN and TEST are folders of <lang>.txt (one text a line) or <lang>.jsonl ("text" in every line).
The ruler is the published recipe on plain transformers (bench/plain.py), which never imports the
extension; the rows of ours run distaya_ext.compress on the same calibration windows.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from bench import harness  # noqa: E402
from bench.plain import (  # noqa: E402
    Drawn,
    Method,
    balanced,
    evaluate,
    read_folder,
    textbook_compress,
    windows,
)


@dataclass
class Outcome:
    method: str
    side: str
    nll: float
    delta: float
    per_language: dict[str, float]
    zeros: float
    seconds: float
    settings: dict = field(default_factory=dict)


def methods(group: int, symmetric: bool) -> list[Method]:
    half, two_four = {"sparsity": 0.5}, {"nm": (2, 4)}
    int4 = {"bits": 4, "group": group, "symmetric": symmetric}
    rows = [Method("dense", "dense")]
    for label, pattern in (("50 %", half), ("2:4", two_four)):
        rows.append(Method(f"magnitude {label}", "magnitude", **pattern))
        rows.append(Method(f"wanda {label}", "wanda", **pattern))
        for side in ("textbook", "ours"):
            rows.append(Method(f"sparsegpt {label}", "sparsegpt", side, **pattern))
    for side in ("textbook", "ours"):
        rows.append(Method("sparsegpt 2:4 + int4", "sparsegpt", side, **two_four, **int4))
    rows.append(Method("rtn int4", "rtn", **int4))
    for side in ("textbook", "ours"):
        rows.append(Method("gptq int4", "gptq", side, **int4))
    return rows


def our_model(path: str, drawn: Drawn, method: Method):
    """The same method through the extension's driver, loaded back from the folder it wrote."""
    try:
        from distaya_ext.compress import compress
        from distaya_ext.recipe import Recipe
    except ImportError as error:
        raise SystemExit(
            f"ours does not import ({error}); --sides textbook leaves it out"
        ) from error
    from transformers import AutoModelForCausalLM

    pattern = {"nm": "{}:{}".format(*method.nm)} if method.nm else {}
    pattern |= {"sparsity": method.sparsity} if method.sparsity else {}
    if method.bits:
        pattern |= {"bits": method.bits, "group": method.group, "symmetric": method.symmetric}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "compressed"
        compress(path, out, Recipe(model=path, method=method.kind, **pattern), texts=drawn)
        return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def outcome(model, method: Method, test: dict[str, Tensor], dense: float | None, began: float):
    spent = time.perf_counter() - began
    nll, each = evaluate(model, test)
    weights = [m.weight for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    delta = 0.0 if dense is None else nll - dense
    return Outcome(method.name, method.side, nll, delta, each, zeros, spent, asdict(method))


def run(args, say: Callable[[str], None]) -> list[Outcome]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    texts = read_folder(args.test)
    if args.test_windows:
        drawn = balanced(texts, tokenizer, args.test_windows, args.window)
        test = {lang: drawn.of(lang) for lang in texts}
    else:
        test = {lang: windows(texts[lang], tokenizer, args.window) for lang in texts}
    calibration = balanced(
        read_folder(args.calibration), tokenizer, args.calibration_windows, args.window
    )
    say(f"{sum(map(len, test.values()))} test windows, {len(calibration.ids)} calibration windows")
    results: list[Outcome] = []
    dense: float | None = None
    for method in methods(args.group, args.symmetric):
        if args.only and not any(part in f"{method.side} {method.name}" for part in args.only):
            continue
        if method.side not in args.sides:
            continue
        began = time.perf_counter()
        if method.side == "ours":
            model = our_model(args.model, calibration, method)
        else:
            model = copy.deepcopy(base)
            if method.kind != "dense":
                textbook_compress(model, calibration.ids, method)
        result = outcome(model, method, test, dense, began)
        dense = result.nll if method.kind == "dense" else dense
        results.append(result)
        say(
            f"{method.side:9} {method.name:22} NLL {result.nll:.4f}  delta {result.delta:+.4f}"
            f"  zeros {result.zeros:.3f}  {result.seconds:.1f} s"
        )
    return results


def table(results: list[Outcome]) -> str:
    """Markdown: one line per method, textbook and ours side by side."""
    names = list(dict.fromkeys(r.method for r in results))
    by = {(r.method, r.side): r for r in results}
    lines = ["| method | textbook NLL | ours NLL | delta textbook | delta ours |"]
    lines.append("|---|--:|--:|--:|--:|")
    for name in names:
        cells = [by.get((name, side)) for side in ("textbook", "ours")]
        nll = [f"{c.nll:.3f}" if c else "" for c in cells]
        delta = [f"{c.delta:+.3f}" if c else "" for c in cells]
        lines.append(f"| {name} | {' | '.join(nll)} | {' | '.join(delta)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    texts = ROOT / "distaya_ext" / "assets" / "texts"
    parser.add_argument("--model", default=str(ROOT / "distaya_ext" / "assets" / "nano-aya"))
    parser.add_argument("--calibration", type=Path, default=texts / "calibration")
    parser.add_argument("--test", type=Path, default=texts / "evaluation")
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--test-windows", type=int, help="languages in turn (default: all)")
    parser.add_argument("--group", type=int, default=128, help="int4 group, 0 = whole row")
    parser.add_argument("--symmetric", action="store_true", help="symmetric int4 grids")
    parser.add_argument("--sides", nargs="+", default=["textbook", "ours"])
    parser.add_argument("--only", nargs="+", help="parts of row names")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--readme", action="store_true", help="rewrite the table in README.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = run(args, lambda line: print(line, flush=True))
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    if args.readme:
        harness.write_table(ROOT / "README.md", "quality", table(results))


if __name__ == "__main__":
    main()
