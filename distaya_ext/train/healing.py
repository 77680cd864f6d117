"""What healing does unless it is told otherwise."""

from __future__ import annotations

from typing import Any

HEALING: dict[str, Any] = {
    "train": "lora",
    "rank": 32,
    "learning_rate": 6e-3,
    "loss": {"kl": 1.0, "cosine": 1.0},
}
