"""What micro-batches said of themselves, and what they draw random numbers from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Tally:
    """Sums of the loss's terms times their labels, the labels, and tokens without padding."""

    sums: dict[str, float] = field(default_factory=dict)
    count: float = 0.0
    tokens: int = 0

    def add(self, found: Mapping[str, Any], count: float) -> None:
        """The terms of one batch, means over so many labels."""
        self.count += count
        for name, term in found.items():
            if name != "count":
                value = count * float(torch.as_tensor(term).detach())
                self.sums[name] = self.sums.get(name, 0.0) + value

    def join(self, sums: Mapping[str, float], count: float, tokens: int) -> None:
        """What plain() says of another one."""
        self.count += count
        self.tokens += tokens
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def plain(self) -> list[Any]:
        return [self.sums, self.count, self.tokens]

    def means(self) -> dict[str, float]:
        return {name: total / self.count for name, total in self.sums.items()}


def listed(found: Mapping[str, Any]) -> str:
    """The terms of a loss, in words."""
    terms = {name: float(torch.as_tensor(value).detach()) for name, value in found.items()}
    return ", ".join(f"{name} {value:g}" for name, value in terms.items() if name != "count")


def seed_all(seed: int, step: int, micro: int) -> None:
    """Random numbers of a micro-batch, on all devices, which do not depend on what was drawn before
    it: whoever runs it draws the same.
    """
    digest = hashlib.sha256(repr([seed, 6, step, micro]).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
