"""Seconds of a generate() call, split into prefill and decode by when its tokens came out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Speed:
    """prompt tokens took `prefill` seconds up to the first new one; the other new ones `decode`."""

    prompt: int
    new: int
    prefill: float
    decode: float

    @property
    def prefill_rate(self) -> float | None:
        """Tokens per second, None where nothing was timed."""
        return self.prompt / self.prefill if self.prefill > 0 else None

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first new token, None where there was only that one."""
        return (self.new - 1) / self.decode if self.new > 1 and self.decode > 0 else None


class Stopwatch:
    """A streamer for transformers' generate(): it keeps when each token came, not the tokens.

    generate() hands over the prompt first and then one new token after the other.
    """

    def __init__(self) -> None:
        self._prompt = 0
        self._times: list[float] = []

    def put(self, value: Any) -> None:
        if not self._times:
            self._prompt = value.shape[-1]
        self._times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""

    def speed(self) -> Speed:
        """What was timed so far; zeros before the first new token."""
        times = self._times
        prefill = times[1] - times[0] if len(times) > 1 else 0.0
        decode = times[-1] - times[1] if len(times) > 2 else 0.0
        return Speed(self._prompt, max(0, len(times) - 1), prefill, decode)
