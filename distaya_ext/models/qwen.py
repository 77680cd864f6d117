"""Qwen2 (biases on q, k, v) and Qwen3 (norms on q and k): the sequential block."""

from .architecture import SEQUENTIAL, Architecture

ARCHITECTURES = tuple(Architecture(name, SEQUENTIAL) for name in ("qwen2", "qwen3"))
