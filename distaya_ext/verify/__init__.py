"""Looking at a finished folder: is everything there, unchanged, and in its range and pattern."""

from .findings import Finding, Findings
from .run import verify

__all__ = ["Finding", "Findings", "verify"]
