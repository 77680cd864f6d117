"""The rows of the speed table: for each, who competes, how much work it is, and what must hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import shapes, textbook, tuned
from bench.harness import Contender

TOKENS = 2048
MODES: dict[str, dict[str, Any]] = {
    "50 %": {"sparsity": 0.5},
    "2:4": {"nm": (2, 4)},
    "2:4 + int4": {"nm": (2, 4), "bits": 4, "group": 128},
}


@dataclass(frozen=True)
class Case:
    """One row: who competes, how much work it is, and what must be reached on one thread."""

    contenders: list[Contender]
    fp32: float = 0.0  # GFLOP
    bf16: float = 0.0
    bars: tuple[float, float] = (0.0, 0.0)  # times textbook, times tuned
    check: Callable[[dict[str, list]], str] = lambda _: ""


def ours_or_stop():
    """The extension's rooms; a clear end where it is not built."""
    try:
        from distaya_ext.ops import cholesky, hessian, obs
    except ImportError as error:
        text = f"the extension does not import ({error}); --rulers-only leaves it out"
        raise SystemExit(text) from error
    return hessian, cholesky, obs


def our_options(mode: dict[str, Any]) -> dict[str, Any]:
    """Mode of the rulers -> arguments of obs.obs."""
    from distaya_ext.ops.obs import Quant

    options = {k: v for k, v in mode.items() if k in ("sparsity", "nm")}
    if mode.get("bits"):
        options["quant"] = Quant(bits=mode["bits"], group=mode["group"])
    return options


def hessian_case(columns: int, tokens: int, ours: bool) -> Case:
    X = shapes.activations(tokens, columns)

    def zeros():
        return (torch.zeros(columns, columns),)

    def book(hessian: textbook.Hessian):
        hessian.add(X)
        return hessian.H

    def mine(H: Tensor):
        ours_or_stop()[0].hessian_(H, X)
        return H

    def fast(H: Tensor):
        tuned.hessian_(H, X)
        return H

    contenders = [Contender("textbook", book, lambda: (textbook.Hessian(columns),))]
    contenders.append(Contender("tuned", fast, zeros))
    if ours:
        contenders.append(Contender("ours", mine, zeros, runs=5))

    def check(results: dict[str, list]) -> str:
        if "ours" not in results:
            return ""
        mine, fast = results["ours"][0].triu(), results["tuned"][0].triu()
        return f"H differs by {float((mine - fast).norm() / fast.norm()):.1e}"

    work = columns * (columns + 1) * tokens / 1e9
    return Case(contenders, bf16=work, bars=(5.0, 0.0), check=check)


def factor_case(n: int, ours: bool) -> Case:
    H = shapes.hessian(n, min(TOKENS, n))
    long = n > 8192
    contenders = [
        Contender("textbook", lambda: textbook.factor(H), runs=1 if long else 3),
        Contender("tuned", lambda: tuned.factor(H), runs=1 if long else 3),
    ]
    if ours:
        room = ours_or_stop()[1]
        contenders.append(Contender("ours", lambda: room.cholesky(H), runs=2 if long else 5))

    def check(results: dict[str, list]) -> str:
        if "ours" not in results:
            return ""
        mine, fast = results["ours"][0].R, results["tuned"][0]
        return f"R differs by {float((mine - fast).norm() / fast.norm()):.1e}"

    return Case(contenders, fp32=n**3 / 3 / 1e9, bars=(7.0, 0.0), check=check)


def sweep_case(rows: int, columns: int, mode: str, ours: bool) -> Case:
    options, long = MODES[mode], rows > 8192
    H, W = shapes.hessian(columns, TOKENS), shapes.weights(rows, columns)
    contenders = [
        Contender("textbook", lambda: textbook.sweep(W, H, **options), runs=1 if long else 2),
        Contender("tuned", lambda: tuned.sweep(W, R=tuned.factor(H), **options), runs=2),
    ]
    if ours:
        room, mine = ours_or_stop()[2], our_options(options)
        contenders.append(Contender("ours", lambda: room.obs(W, H, **mine), runs=3))
    work = (columns**3 / 3 + rows * columns**2) / 1e9
    bars = (6.0 if mode == "50 %" else 5.0, 2.5)
    return Case(contenders, fp32=work, bars=bars, check=same_loss)


def same_loss(results: dict[str, list]) -> str:
    """Faster must not mean different: total loss and masks of ours against the textbook's."""
    if "ours" not in results:
        return ""
    mine, book = results["ours"][0], results["textbook"][0]
    loss = float(mine.loss.double().sum() / book.loss.double().sum())
    masks = float((mine.mask == book.mask).double().mean())
    return f"loss ratio {loss:.5f}, masks agree {masks:.3%}"


def layer_case(layer: shapes.Layer, tokens: int, mode: str, ours: bool) -> Case:
    """Every matrix of a layer from its activations: Hessians, factors, sweeps."""
    options = MODES[mode]
    X = [shapes.activations(tokens, stage[0][2], seed=i) for i, stage in enumerate(layer.stages)]
    W = [
        [shapes.weights(rows, columns, seed=10 * i + k) for k, (_, rows, columns) in enumerate(s)]
        for i, s in enumerate(layer.stages)
    ]

    def book():  # one Hessian and one factorisation per matrix, as published
        loss = 0.0
        for x, stage in zip(X, W, strict=True):
            for w in stage:
                hessian = textbook.Hessian(x.shape[1])
                hessian.add(x)
                hessian.H.div_(2)  # ours has no factor 2: losses become comparable
                loss += float(textbook.sweep(w, hessian.H, **options).loss.double().sum())
        return loss

    def fast():
        loss = 0.0
        for x, stage in zip(X, W, strict=True):
            H = torch.zeros(x.shape[1], x.shape[1])
            tuned.hessian_(H, x)
            R = tuned.factor(H)
            loss += float(tuned.sweep(torch.cat(stage), R=R, **options).loss.double().sum())
        return loss

    def mine():
        hessian, cholesky, obs = ours_or_stop()
        loss = 0.0
        for x, stage in zip(X, W, strict=True):
            H = torch.zeros(x.shape[1], x.shape[1])
            hessian.hessian_(H, x)
            factor = cholesky.cholesky(H, overwrite=True)
            result = obs.obs(torch.cat(stage), factor=factor, **our_options(options))
            loss += float(result.loss.sum())
        return loss

    contenders = [Contender("textbook", book, runs=1), Contender("tuned", fast, runs=1)]
    if ours:
        contenders.append(Contender("ours", mine, runs=2))

    def check(results: dict[str, list]) -> str:
        if "ours" not in results:
            return ""
        return f"loss ratio {results['ours'][0] / results['textbook'][0]:.5f}"

    fp32 = bf16 = 0.0
    for stage in layer.stages:
        n = stage[0][2]
        bf16 += n * (n + 1) * tokens / 1e9
        fp32 += (n**3 / 3 + sum(rows for _, rows, _ in stage) * n**2) / 1e9
    return Case(contenders, fp32=fp32, bf16=bf16, bars=(8.0, 0.0), check=check)


def cases(quick: bool, ours: bool) -> dict[str, Callable[[], Case]]:
    """Row name -> what builds it, cheap rows first."""
    d, ff, tokens = (256, 896, 512) if quick else (4096, 14336, TOKENS)
    layer = shapes.SMALL if quick else shapes.AYA_8B
    table: dict[str, Callable[[], Case]] = {
        f"Hessian {d} x {tokens} bf16": lambda: hessian_case(d, tokens, ours),
        f"factor {d}": lambda: factor_case(d, ours),
    }
    for rows in (d, ff):
        for mode in MODES:
            name = f"factor + sweep {rows}x{d}, {mode}"
            table[name] = lambda rows=rows, mode=mode: sweep_case(rows, d, mode, ours)
    table[f"factor {ff}"] = lambda: factor_case(ff, ours)
    title = "small layer" if quick else "Aya-8B layer"
    table[f"{title}, all matrices, 50 %"] = lambda: layer_case(layer, tokens, "50 %", ours)
    return table
