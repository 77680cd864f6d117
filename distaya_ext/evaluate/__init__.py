"""Per-language quality: how much text surprises a model, before and after compression."""

from .continuations import Prompt, beginnings
from .gate import GATES, parse_gates
from .load import Loaded, load
from .result import Evaluation, LanguageResult
from .run import evaluate, evaluate_loaded
from .samples import Samples, cut_lines, cut_windows

__all__ = [
    "GATES",
    "Evaluation",
    "LanguageResult",
    "Loaded",
    "Prompt",
    "Samples",
    "beginnings",
    "cut_lines",
    "cut_windows",
    "evaluate",
    "evaluate_loaded",
    "load",
    "parse_gates",
]
