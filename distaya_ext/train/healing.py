"""What healing does unless it is told otherwise.

Chosen on nano-aya by short runs, where KL won back more than cross entropy or hidden states alone,
and both a little more than KL; bench/healing.py measures what they are worth.
"""

from __future__ import annotations

from typing import Any

HEALING: dict[str, Any] = {
    "train": "lora",
    "rank": 32,
    "learning_rate": 6e-3,
    "loss": {"kl": 1.0, "cosine": 1.0},
}
