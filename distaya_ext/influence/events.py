"""What scoring layers tells while it goes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """`done` of `total` forwards of a chunk of tokens through a layer (or the head) are behind;
    what says which layer.
    """

    done: int
    total: int
    what: str
