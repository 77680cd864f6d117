"""The textbook recipe on plain transformers, and the texts and the yardstick it is judged with.

Layer after layer: one forward of the calibration windows through the uncompressed layer (one
Hessian per Linear, as published), every Linear compressed, then a second forward through the
compressed layer that feeds the next. Everything in memory, nothing streamed, no extension.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import textbook

BATCH = 8  # windows per forward


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    kind: str  # dense | magnitude | wanda | ria | dass | sparsegpt | gptq | rtn
    side: str = "textbook"  # or ours
    sparsity: float = 0.0
    nm: tuple[int, int] | None = None
    bits: int = 0
    group: int = 0
    symmetric: bool = False
    order: str = "natural"
    mlp_only: bool = False  # attention stays dense, as in everything DaSS is published with


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
    """[N, length] int64: BOS text EOS, BOS text EOS ... as one stream, cut; the rest is dropped."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in texts:
        ids += begin + tokenizer(text, add_special_tokens=False).input_ids + end
        if limit and len(ids) >= limit * length:
            break
    count = min(len(ids) // length, limit or len(ids))
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


@dataclass(frozen=True)
class Drawn:
    """Token windows: ids int64 [N, length] and the language of each."""

    ids: Tensor
    languages: list[str]

    def of(self, language: str) -> Tensor:
        return self.ids[torch.tensor([other == language for other in self.languages])]


def balanced(texts: dict[str, list[str]], tokenizer, total: int, length: int) -> Drawn:
    """`total` windows: the first of each language, then the second of each, and so on."""
    share = -(-total // len(texts))
    pool = {lang: windows(texts[lang], tokenizer, length, share) for lang in texts}
    turns = [(w[i], lang) for i in range(share) for lang, w in pool.items() if i < len(w)]
    if len(turns) < total:
        raise SystemExit(f"{total} windows asked, the texts give {len(turns)}")
    ids, languages = zip(*turns[:total], strict=True)
    return Drawn(torch.stack(ids), list(languages))


def drawn(texts: dict[str, list[str]], tokenizer, total: int, length: int, seed: int) -> Drawn:
    """Calibration windows of a seed, exactly `total` of them, the same for every row of a bench.

    The documents of each language are shuffled by the seed and the language's code, the languages
    by the seed; then as balanced(): the first window of each language, the second of each, ...
    128 windows of 23 languages are five of each and a sixth of the first 13 in the seed's order.
    """
    shuffled = {lang: list(documents) for lang, documents in texts.items()}
    for lang, documents in shuffled.items():
        random.Random(f"{seed}{lang}").shuffle(documents)
    order = list(shuffled)
    random.Random(seed).shuffle(order)
    return balanced({lang: shuffled[lang] for lang in order}, tokenizer, total, length)


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
    """Compress every Linear of every decoder layer of `model` in place (or those of its MLPs)."""
    layers = model.model.layers
    hidden, calls = first_inputs(model, layers, ids)
    for layer in layers:
        chosen = layer.mlp if method.mlp_only else layer
        linears = {n: m for n, m in chosen.named_modules() if isinstance(m, nn.Linear)}
        hessians = {n: textbook.Hessian(m.in_features) for n, m in linears.items()}

        def watch(name: str, store=hessians):
            return lambda _module, args, _out: store[name].add(args[0])

        handles = [m.register_forward_hook(watch(n)) for n, m in linears.items()]
        if method.kind not in ("magnitude", "rtn"):
            for _ in through(layer, hidden, calls):
                pass
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            W = linear.weight.detach()
            if method.kind == "dass" and not name.endswith("down_proj"):
                (down,) = (h for other, h in hessians.items() if other.endswith("down_proj"))
                pattern = {"sparsity": method.sparsity, "nm": method.nm}
                W = W * textbook.dass(W, down.column_norms(), **pattern)
            else:
                W = solve(W, hessians[name], method)
            # the files hold bf16: both sides are judged on what they can write
            linear.weight.copy_(W.to(torch.bfloat16))
        hidden = list(through(layer, hidden, calls))


def solve(W: Tensor, hessian: textbook.Hessian, method: Method) -> Tensor:
    pattern = {"sparsity": method.sparsity, "nm": method.nm}
    grids = {"bits": method.bits, "group": method.group, "symmetric": method.symmetric}
    if method.kind == "magnitude":
        return W * textbook.magnitude(W, **pattern)
    if method.kind in ("wanda", "dass"):
        return W * textbook.wanda(W, hessian.column_norms(), **pattern)
    if method.kind == "ria":
        return W * textbook.ria(W, hessian.column_norms(), **pattern)
    if method.kind == "rtn":
        return textbook.rtn(W, **grids).W
    if method.kind == "gptq":
        return textbook.gptq(W, hessian.H, **grids, order=method.order).W
    return textbook.sweep(W, hessian.H, **pattern, **grids).W
