"""`reference=True` makes the decisions of the published SparseGPT and GPTQ, element for element.

The textbook runs in float64 and ours in float32, so a decision may differ only where it hangs on
float32 rounding. On well-separated inputs there is no such place; a seed whose own decisions change
when the textbook itself is run in float32 is not well separated and is passed over - but never all.
"""

import sys
from pathlib import Path

import pytest
import torch

from distaya_ext import Quant
from distaya_ext.ops.obs import obs

sys.path.append(str(Path(__file__).resolve().parent.parent))
from bench import textbook

MODES = {
    "50 %": {"sparsity": 0.5},
    "70 %": {"sparsity": 0.7},
    "2:4": {"nm": (2, 4)},
    "4:8": {"nm": (4, 8)},
    "int4 row": {"bits": 4},
    "int4 g128": {"bits": 4, "group": 128},
    "int4 g64": {"bits": 4, "group": 64},
    "int3 g32": {"bits": 3, "group": 32},
    "int4 row act-order": {"bits": 4, "order": "activation"},
    "int4 g128 act-order": {"bits": 4, "group": 128, "order": "activation"},
    "int4 g128 static act-order": {"bits": 4, "group": 128, "static": True, "order": "activation"},
    "int8 g128 mse": {"bits": 8, "group": 128, "mse": True},
    "int4 row symmetric": {"bits": 4, "symmetric": True},
    "2:4 + int4 row": {"nm": (2, 4), "bits": 4},
    "50 % + int4 row": {"sparsity": 0.5, "bits": 4},
    "2:4 + int4 g128": {"nm": (2, 4), "bits": 4, "group": 128},
}


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    rows, cols, tokens = 24, 384, 1200
    mix = torch.randn(cols, cols, generator=make, dtype=torch.float64) / cols**0.5
    scale = torch.rand(cols, generator=make, dtype=torch.float64) + 0.3
    X = torch.randn(tokens, cols, generator=make, dtype=torch.float64) @ mix * scale
    W = torch.randn(rows, cols, generator=make, dtype=torch.float64).float()
    return W, (2 / tokens * X.T @ X).float()


def ours(W, H, mode):
    options = dict(mode)
    quant = None
    if "bits" in options:
        quant = Quant(
            bits=options.pop("bits"),
            group=options.pop("group", 0),
            symmetric=options.pop("symmetric", False),
            scale="mse" if options.pop("mse", False) else "minmax",
            static=options.pop("static", False),
        )
    return obs(W, H, quant=quant, reference=True, **options)


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is None or b is None or torch.equal(a.long(), b.long())


@pytest.mark.parametrize("name", MODES)
def test_published_decisions(name):
    mode, compared = MODES[name], 0
    for seed in range(12):
        W, H = problem(seed)
        exact = textbook.sweep(W.double(), H.double(), dtype=torch.float64, **mode)
        narrow = textbook.sweep(W, H, **mode)
        if not (same(exact.mask, narrow.mask) and same(exact.codes, narrow.codes)):
            continue
        compared += 1
        got = ours(W, H, mode)
        if exact.mask is not None:
            assert torch.equal(got.mask, exact.mask)
        assert same(got.codes, exact.codes)
        torch.testing.assert_close(got.W.double(), exact.W, rtol=0, atol=2e-4)
        torch.testing.assert_close(got.loss, exact.loss, rtol=1e-4, atol=1e-6)
        if compared == 2:
            break
    assert compared, f"no seed is well separated for {name}"
