"""The best recipe for a budget of bytes, from measured sensitivities (docs: `distaya search`)."""

from .options import Options
from .result import Found, Row
from .run import search

__all__ = ["Found", "Options", "Row", "search"]
