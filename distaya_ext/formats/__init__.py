"""How quantised weights lie in files: whose format it is, what each module holds, and its codes.

scheme = read_scheme(config, "config.json")        # None: the model is not quantised
module = scheme.for_module("model.layers.0.self_attn.q_proj")
grid = module.decode(tensors, rows, cols, name)    # codes, scales, zeros
tensors = module.encode(grid)
"""

from .grid import Grid
from .module import ModuleScheme
from .scheme import Scheme, read_scheme

__all__ = ["Grid", "ModuleScheme", "Scheme", "read_scheme"]
