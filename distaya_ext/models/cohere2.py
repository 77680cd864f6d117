"""Cohere2 (Command-R7B, tiny-aya): as Cohere; every fourth layer attends fully and has no RoPE.

The per-layer masks and positions are recorded from the model's own forward, so the table is the
same.
"""

from .architecture import PARALLEL, Architecture

ARCHITECTURES = (Architecture("cohere2", PARALLEL),)
