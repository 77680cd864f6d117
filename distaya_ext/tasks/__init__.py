"""Tasks of lm-evaluation-harness on our models, packed ones too (extra: distaya-ext[tasks])."""

from .result import TaskResults, TaskRow, mcnemar
from .run import run_tasks

__all__ = ["TaskResults", "TaskRow", "mcnemar", "run_tasks"]
