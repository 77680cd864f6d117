"""distaya_ext: make multilingual language models small and fast, and prove it per language."""

import torch  # noqa: F401  (first: its OpenMP runtime must be the one our kernels share)

__version__ = "0.1.0"
