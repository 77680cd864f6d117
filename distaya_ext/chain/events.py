"""What a chain tells beside the events of its steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepStarted:
    """Step `number` (from 1) of `steps` begins: drop, compress, heal or evaluate."""

    number: int
    steps: int
    name: str


@dataclass(frozen=True)
class StepFinished:
    """A step's result is on disk. kept: it was there from an earlier run, which took `seconds`."""

    number: int
    steps: int
    name: str
    seconds: float
    kept: bool
