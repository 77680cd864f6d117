"""The matrices of the Aya models by name, as they multiply activations: rows x columns."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import UsageError

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
MOST_WEIGHTS = 1 << 33  # of a shape given by its sizes


@dataclass(frozen=True)
class Model:
    """Sizes of one decoder layer and of the vocabulary."""

    hidden: int
    ff: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def kv(self) -> int:
        return self.hidden // self.heads * self.kv_heads


MODELS = {
    "aya-8b": Model(4096, 14336, 32, 8, 256000),  # Aya-23-8B, Aya-Expanse-8B
    "aya-32b": Model(8192, 24576, 64, 8, 256000),  # Aya-Expanse-32B
    "tiny-aya": Model(2048, 11008, 16, 4, 262144),
}


@dataclass(frozen=True)
class Shape:
    """One matrix. head: the output head (or embedding), kept in 8 bits with one scale per row."""

    name: str
    rows: int
    cols: int
    head: bool = False

    @property
    def weights(self) -> int:
        return self.rows * self.cols


def of_model(name: str) -> list[Shape]:
    """Every matrix of a layer, q/k/v/gate/up as one (they share their input), and the head."""
    m = MODELS[name]
    fused = m.hidden + 2 * m.kv + 2 * m.ff
    return [
        Shape(f"{name} gate/up", m.ff, m.hidden),
        Shape(f"{name} down", m.hidden, m.ff),
        Shape(f"{name} q/o", m.hidden, m.hidden),
        Shape(f"{name} k/v", m.kv, m.hidden),
        Shape(f"{name} qkv+gate+up", fused, m.hidden),
        Shape(f"{name} head", m.vocab, m.hidden, head=True),
    ]


def find(texts: list[str]) -> list[Shape]:
    """Shapes whose names contain one of the texts ("down", "aya-8b"), or ROWSxCOLS as given.

    UsageError for a text that names nothing.
    """
    known = [shape for name in MODELS for shape in of_model(name)]
    found: list[Shape] = []
    for text in texts:
        sizes = re.fullmatch(r"(\d+)x(\d+)", text)
        if sizes:
            rows, cols = int(sizes[1]), int(sizes[2])
            if not 0 < rows * cols <= MOST_WEIGHTS:
                raise UsageError(f"shape {text} has {rows * cols} weights; 1 to {MOST_WEIGHTS} fit")
            named = [Shape(text, rows, cols)]
        else:
            named = [shape for shape in known if text.lower() in shape.name]
        if not named:
            raise UsageError(
                f"shape {text!r} is neither ROWSxCOLS nor part of a name such as 'aya-8b down'"
            )
        found += [shape for shape in named if shape not in found]
    return found
