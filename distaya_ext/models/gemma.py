"""Gemma 1, 2 and 3 (text): the sequential block; 2 and 3 add norms after attention and MLP.

Norms that follow o_proj or down_proj do not change which Linears share an input, so one table
serves all.
"""

from .architecture import SEQUENTIAL, Architecture

ARCHITECTURES = (
    Architecture("gemma", SEQUENTIAL),
    *(Architecture(name, SEQUENTIAL, adds=False) for name in ("gemma2", "gemma3_text")),
)
