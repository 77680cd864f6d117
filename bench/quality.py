"""Quality of every method on a real model: NLL per token before and after, textbook beside ours.

    python bench/quality.py --calibration TRAIN --test TEST [--model MODEL] [--json OUT] [--readme]

TRAIN and TEST are folders of <lang>.txt (one text a line) or <lang>.jsonl ("text" in every line).
The ruler is the published recipe on plain transformers: layer after layer, one forward of the
calibration windows through the uncompressed layer (one Hessian per Linear), then a second one
through the compressed layer that feeds the next. It never imports the extension; "ours" rows do.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from bench import harness, textbook  # noqa: E402

BATCH = 8  # windows per forward


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    kind: str  # dense | magnitude | wanda | sparsegpt | gptq | rtn
    side: str = "textbook"  # or ours
    sparsity: float = 0.0
    nm: tuple[int, int] | None = None
    bits: int = 0
    group: int = 0
    order: str = "natural"


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


def methods(group: int) -> list[Method]:
    half, two_four = {"sparsity": 0.5}, {"nm": (2, 4)}
    int4 = {"bits": 4, "group": group}
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


# ---------------------------------------------------------------- texts


def read_folder(folder: Path) -> dict[str, list[str]]:
    """{language: texts} of a folder of <lang>.txt / <lang>.jsonl."""
    texts: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        if path.suffix == ".txt":
            texts[path.stem] = [line for line in lines if line.strip()]
        elif path.suffix == ".jsonl":
            texts[path.stem] = [json.loads(line)["text"] for line in lines if line.strip()]
    if not texts:
        raise SystemExit(f"no <lang>.txt or <lang>.jsonl in {folder}")
    return texts


def windows(texts: list[str], tokenizer, length: int, limit: int | None = None) -> Tensor:
    """[N, length] int64: the texts joined by the end token, cut, the rest dropped."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False).input_ids
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if limit and len(ids) >= limit * length:
            break
    count = min(len(ids) // length, limit or len(ids))
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


def balanced(texts: dict[str, list[str]], tokenizer, total: int, length: int) -> Tensor:
    """`total` calibration windows, languages in turn until there are enough."""
    share = -(-total // len(texts))
    pool = [windows(texts[lang], tokenizer, length, share) for lang in texts]
    turns = [w[i] for i in range(share) for w in pool if i < len(w)]
    if len(turns) < total:
        raise SystemExit(f"{total} calibration windows asked, the texts give {len(turns)}")
    return torch.stack(turns[:total])


@torch.inference_mode()
def evaluate(model, ids_per_language: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
    """Mean NLL in nats per predicted token: over all windows, and per language."""
    sums: dict[str, float] = {}
    count = 0
    for language, ids in ids_per_language.items():
        total = 0.0
        for batch in ids.split(BATCH * 2):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            total += float(
                nn.functional.cross_entropy(
                    logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
                )
            )
        sums[language] = total
        count += ids.shape[0] * (ids.shape[1] - 1)
    each = {
        lang: sums[lang] / (ids.shape[0] * (ids.shape[1] - 1))
        for lang, ids in ids_per_language.items()
        if len(ids)
    }
    return sum(sums.values()) / count, each


# ---------------------------------------------------------------- the ruler on plain transformers


class _Stop(Exception):
    pass


def first_inputs(model, layers: nn.ModuleList, ids: Tensor) -> tuple[list[Tensor], list[tuple]]:
    """What layer 0 is called with for every batch: hidden states, and (args, kwargs) verbatim."""
    hidden: list[Tensor] = []
    calls: list[tuple] = []

    def catch(_module, args, kwargs):
        kwargs = dict(kwargs)
        states = args[0] if args else kwargs.pop("hidden_states")
        hidden.append(states)
        calls.append((args[1:], kwargs))
        raise _Stop

    handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for batch in ids.split(BATCH):
        with contextlib.suppress(_Stop):
            model(input_ids=batch, use_cache=False)
    handle.remove()
    return hidden, calls


def through(layer: nn.Module, hidden: list[Tensor], calls: list[tuple]) -> Iterator[Tensor]:
    for states, (args, kwargs) in zip(hidden, calls, strict=True):
        out = layer(states, *args, **kwargs)
        yield out[0] if isinstance(out, tuple) else out


@torch.inference_mode()
def textbook_compress(model, ids: Tensor, method: Method) -> None:
    """Compress every Linear of every decoder layer of `model` in place."""
    layers = model.model.layers
    hidden, calls = first_inputs(model, layers, ids)
    for layer in layers:
        linears = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        hessians = {n: textbook.Hessian(m.in_features) for n, m in linears.items()}

        def watch(name: str, store=hessians):
            return lambda _module, args, _out: store[name].add(args[0])

        handles = [m.register_forward_hook(watch(n)) for n, m in linears.items()]
        if method.kind in ("wanda", "sparsegpt", "gptq"):
            for _ in through(layer, hidden, calls):
                pass
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            W = solve(linear.weight.detach(), hessians[name], method)
            # the files hold bf16: both sides are judged on what they can write
            linear.weight.copy_(W.to(torch.bfloat16))
        hidden = list(through(layer, hidden, calls))


def solve(W: Tensor, hessian: textbook.Hessian, method: Method) -> Tensor:
    pattern = {"sparsity": method.sparsity, "nm": method.nm}
    grids = {"bits": method.bits, "group": method.group}
    if method.kind == "magnitude":
        return W * textbook.magnitude(W, **pattern)
    if method.kind == "wanda":
        return W * textbook.wanda(W, hessian.column_norms(), **pattern)
    if method.kind == "rtn":
        return textbook.rtn(W, **grids).W
    if method.kind == "gptq":
        return textbook.gptq(W, hessian.H, **grids, order=method.order).W
    return textbook.sweep(W, hessian.H, **pattern, **grids).W


# ---------------------------------------------------------------- running


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
    test = {
        lang: windows(texts, tokenizer, args.window, args.limit)
        for lang, texts in read_folder(args.test).items()
    }
    calibration = balanced(
        read_folder(args.calibration), tokenizer, args.calibration_windows, args.window
    )
    say(f"{sum(map(len, test.values()))} test windows, {len(calibration)} calibration windows")
    results: list[Outcome] = []
    dense: float | None = None
    for method in methods(args.group):
        if args.only and not any(part in f"{method.side} {method.name}" for part in args.only):
            continue
        if method.side not in args.sides:
            continue
        began = time.perf_counter()
        model = copy.deepcopy(base)
        if method.side == "ours":
            raise SystemExit("ours is not wired yet")
        if method.kind != "dense":
            textbook_compress(model, calibration, method)
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
    parser.add_argument("--limit", type=int, help="test windows per language (default: all)")
    parser.add_argument("--group", type=int, default=128, help="int4 group, 0 = whole row")
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
