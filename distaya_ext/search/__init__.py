"""The best recipe for a budget of bytes, from measured sensitivities (docs: `distaya search`)."""

from .choices import DEFAULT
from .options import Options
from .result import Found, Row
from .run import search

__all__ = ["DEFAULT", "Found", "Options", "Row", "search"]
