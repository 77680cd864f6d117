"""What one layer costs one process, by part."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Seconds. gather: apart from the tokens, which may be below 0; token: of each of them; train:
    of each of them, in training; write: of what the file holds, encoded and written.
    """

    read: float = 0.0
    gather: float = 0.0
    token: float = 0.0
    factor: float = 0.0
    inverse: float = 0.0
    rows: float = 0.0
    train: float = 0.0
    write: float = 0.0

    def of_tokens(self, tokens: int) -> float:
        """Their forward, and what is gathered of it."""
        return max(0.0, self.gather + self.token * tokens)

    def seconds(self, tokens: int) -> float:
        """All of it, for so many tokens."""
        rest = self.read + self.factor + self.inverse + self.rows + self.write
        return rest + self.of_tokens(tokens) + self.train * tokens
