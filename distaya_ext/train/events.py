"""What training tells while it goes: small frozen records, made for progress bars and logs."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..compress.events import Notice

__all__ = ["Evaluated", "Event", "Notice", "Resumed", "Started", "Stopped", "TrainStep"]


@dataclass(frozen=True)
class Started:
    """`parameters` numbers will learn in `steps` steps of `rows` windows, on `windows` of them."""

    steps: int
    rows: int
    windows: int
    held_out: int
    parameters: int
    precision: str


@dataclass(frozen=True)
class Resumed:
    """A checkpoint of step `step` was found; training goes on from there."""

    step: int
    steps: int


@dataclass(frozen=True)
class TrainStep:
    """Step `step` (from 1) of `steps` is done; terms by name ("loss" among them), seconds of it."""

    step: int
    steps: int
    terms: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Evaluated:
    """Loss per label on the held-out windows after `step` steps (0: before the first)."""

    step: int
    loss: float
    best: bool = False


@dataclass(frozen=True)
class Stopped:
    """Training ended before its last step, and why."""

    reason: str


Event = Notice | Started | Resumed | TrainStep | Evaluated | Stopped
