"""distaya_ext: make multilingual language models small and fast, and prove it per language.

    from distaya_ext import Recipe, compress, evaluate, read_texts

    recipe = Recipe(model="owner/name", method="sparsegpt", nm="2:4", bits=4,
                    calibration={"path": "texts/", "tokens": 262144})
    compress(recipe.model, "small", recipe)
    found = evaluate("small", read_texts("heldout/"), against=recipe.model)
    print(found.worst, found.gap)
    found.gate(max_worst_ppl_ratio=1.15)

The kernels alone are in ``distaya_ext.ops`` (hessian, cholesky, mask, obs).
"""

import torch  # noqa: F401  (first: its OpenMP runtime must be the one our kernels share)

__version__ = "0.1.0"

# Eager, so that `compress` and `evaluate` are these functions and not the packages of the same
# name, whatever was imported before. None of them imports transformers until it is called.
from distaya_ext.compress import compress
from distaya_ext.evaluate import evaluate
from distaya_ext.quant import Quant
from distaya_ext.recipe import Recipe
from distaya_ext.texts import read_texts

__all__ = ["Quant", "Recipe", "compress", "evaluate", "read_texts"]
