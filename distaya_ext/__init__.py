"""distaya_ext: make multilingual language models small and fast, and prove it per language.

    from distaya_ext import Recipe, compress, evaluate, read_texts

    recipe = Recipe(model="owner/name", method="sparsegpt", nm="2:4", bits=4,
                    calibration={"path": "texts/", "tokens": 262144})
    compress(recipe.model, "small", recipe)
    found = evaluate("small", read_texts("heldout/"), against=recipe.model)
    print(found.worst, found.gap)
    found.gate(max_worst_ppl_ratio=1.15)

    model = distaya_ext.load("small")    # packed weights run as they are, here and in generate()

After ``import distaya_ext`` transformers knows quant_method "distaya". The kernels alone are in
``distaya_ext.ops``.
"""

import os

if os.environ.get("WORLD_SIZE", "1") != "1":  # of ranks that end, we say more with less
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch  # noqa: F401  (first: its OpenMP runtime must be the one our kernels share)

__version__ = "0.1.0"

# Eager, so that `compress` and `evaluate` are these functions and not the packages of the same
# name, whatever was imported before. None of them imports transformers until it is called.
from distaya_ext.compress import compress
from distaya_ext.evaluate import evaluate
from distaya_ext.quant import Quant
from distaya_ext.planning import Plan, plan
from distaya_ext.recipe import Recipe
from distaya_ext.runtime import (
    load,
    register_when_imported,
    resident_bytes,
    set_exact,
    trainable,
    use_kernels,
)
from distaya_ext.texts import read_texts

register_when_imported()

__all__ = [
    "Plan",
    "Quant",
    "Recipe",
    "compress",
    "evaluate",
    "load",
    "plan",
    "read_texts",
    "resident_bytes",
    "set_exact",
    "trainable",
    "use_kernels",
]
