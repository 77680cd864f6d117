"""Running compressed models: packed modules, loading them, and the hooks into transformers.

    model = distaya_ext.load("small")                  # our folders, pack-quantized, GPTQ, dense
    model = distaya_ext.use_kernels(stock_model)       # what transformers loaded, before it ran

Nothing here imports transformers until it is called.
"""

from .glu import PackedGLU, fuse
from .load import load
from .modules import PackedEmbedding, PackedHead, PackedLinear
from .paths import SlowKernelWarning, SlowPath, slow_paths
from .register import register_when_imported
from .swap import dense_bytes, resident_bytes, set_exact, trainable, use_kernels

__all__ = [
    "PackedEmbedding",
    "PackedGLU",
    "PackedHead",
    "PackedLinear",
    "SlowKernelWarning",
    "SlowPath",
    "dense_bytes",
    "fuse",
    "load",
    "register_when_imported",
    "resident_bytes",
    "set_exact",
    "slow_paths",
    "trainable",
    "use_kernels",
]
