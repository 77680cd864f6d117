"""On the bundled model and texts: SparseGPT loses least, and no more than the ruler says.

Judged on the first passages of every language, so that it takes seconds; bench/quality.py judges on
more text. All figures are the change of NLL per token, over all languages, against the dense model.
"""

import sys
from pathlib import Path

import pytest
import torch

import distaya_ext
from distaya_ext import Recipe, compress, read_texts
from distaya_ext.evaluate import cut_lines, evaluate_loaded, load
from distaya_ext.texts import windows

sys.path.append(str(Path(__file__).resolve().parent.parent))
from bench import plain

ASSETS = Path(distaya_ext.__file__).parent / "assets"
NANO = ASSETS / "nano-aya"
PATTERNS = {"50 %": {"sparsity": 0.5}, "2:4": {"nm": "2:4"}}
PASSAGES = 4  # per language


@pytest.fixture(scope="module")
def deltas(tmp_path_factory) -> dict[tuple[str, str], float]:
    """(method, pattern) -> NLL per token more than the dense model's; "textbook" is the ruler."""
    root = tmp_path_factory.mktemp("quality")
    dense = load(NANO)
    calibration = read_texts(ASSETS / "texts" / "calibration")
    drawn = windows(calibration, dense.tokenizer, tokens=23 * 512, window=256)
    models, names = [], []
    for pattern, fields in PATTERNS.items():
        for method in ("sparsegpt", "wanda", "magnitude"):
            out = root / f"{method}-{len(names)}"
            compress(NANO, out, Recipe(model=str(NANO), method=method, **fields), drawn)
            models.append(load(out))
            names.append((method, pattern))
        ruler = load(NANO)
        nm = (2, 4) if "nm" in fields else None
        method = plain.Method("", "sparsegpt", sparsity=fields.get("sparsity", 0.0), nm=nm)
        plain.textbook_compress(ruler.model, drawn.ids, method)
        models.append(ruler)
        names.append(("textbook", pattern))
    texts = read_texts(ASSETS / "texts" / "evaluation", parallel=True)
    few = {lang: lines[:PASSAGES] for lang, lines in texts.items()}
    samples = cut_lines(few, dense.tokenizer, longest=2048)
    found = evaluate_loaded(models, samples, base=dense)
    return {name: f.nll - f.base_nll for name, f in zip(names, found, strict=True)}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt_loses_least(deltas, pattern):
    assert 0 < deltas["sparsegpt", pattern] < deltas["wanda", pattern]
    assert deltas["sparsegpt", pattern] < deltas["magnitude", pattern]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_within_one_percent_of_the_textbook(deltas, pattern):
    """Of the NLL itself: the textbook's dense loss here is about 3.9 nats per token."""
    assert deltas["sparsegpt", pattern] < deltas["textbook", pattern] + 0.01 * 3.9


def test_the_ruler_is_no_straw_man(deltas):
    assert deltas["textbook", "2:4"] < deltas["wanda", "2:4"]
    assert torch.tensor(list(deltas.values())).isfinite().all()
