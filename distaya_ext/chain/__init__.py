"""One chain: leave out layers, compress, heal, evaluate, and go on where a run was stopped."""

from .events import StepFinished, StepStarted
from .result import Chained, Step
from .run import run_chain

__all__ = ["Chained", "Step", "StepFinished", "StepStarted", "run_chain"]
