"""What healing does unless it is told otherwise.

Chosen on nano-aya without layers 3 and 4, by the share of the lost NLL that 50 steps of 1024 tokens
won back on other text: LoRA of rank 16 at 3e-3 with cross entropy 16 %, cosine alone 17 %, KL 22 %,
KL and cosine 22 % (0.4 points above KL alone); rank 32 at 6e-3 with KL and cosine 32 %.
"""

from __future__ import annotations

from typing import Any

HEALING: dict[str, Any] = {
    "train": "lora",
    "rank": 32,
    "learning_rate": 6e-3,
    "loss": {"kl": 1.0, "cosine": 1.0},
}
