"""The streaming driver: policy (settings, walk, driver) and maths (solve) live apart."""

from .calibrate import Calibration
from .events import (
    Calibrated,
    Event,
    FellBack,
    LanguagesDone,
    LayerDone,
    LayerStart,
    Notice,
    Planned,
    Proved,
    Resumed,
    Saved,
    StageDone,
)
from .front import compress
from .report import ModuleReport, Report

__all__ = [
    "Calibrated",
    "Calibration",
    "Event",
    "FellBack",
    "LanguagesDone",
    "LayerDone",
    "LayerStart",
    "ModuleReport",
    "Notice",
    "Planned",
    "Proved",
    "Report",
    "Resumed",
    "Saved",
    "StageDone",
    "compress",
]
