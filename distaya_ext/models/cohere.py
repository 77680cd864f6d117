"""Cohere (Command-R, Aya-23, Aya-Expanse): attention and MLP read one LayerNorm in parallel."""

from .architecture import PARALLEL, Architecture

ARCHITECTURES = (Architecture("cohere", PARALLEL),)
