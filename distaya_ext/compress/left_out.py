"""Calibration windows on which the model overflows: left out from there on, and counted.

One text of a thousand that drives a 16-bit model to infinity must not end a run of hours, and must
not reach its statistics either. A window is left out for good at the first input or output of it
that is not finite: no token of it is gathered, observed or trained on any more, and its activations
become zeros, so that NaN has nowhere to spread from. More than a hundredth of the windows (one is
always allowed), or all of a language, is no accident: then the run ends. Every process of a run
looks at its own windows; what all of them found is known to all when a stage has been gathered.

Only where values are looked at inside a layer (the CPU). On CUDA nothing is read before a layer's
work is queued, so there the first such window ends the run: see calibrate.check_activations.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError
from ..finite import all_finite
from ..ranks import team
from .calibrate import Calibration
from .fallbacks import Fallback
from .report import Report

if TYPE_CHECKING:
    from .replay import Replay
    from .walk import LayerWalk

SHARE = 100  # one window of so many may be left out, or one where there are fewer


class LeftOut:
    """Which windows of a run are left out."""

    def __init__(self, calibration: Calibration, report: Report):
        self.calibration, self.report = calibration, report
        self.most = max(1, len(calibration.languages) // SHARE)
        self._fresh: list[tuple[int, str, str]] = []  # that other processes do not know of

    @property
    def numbers(self) -> list[int]:
        """Of the windows, over all chunks, in the order they were left out."""
        return self.report.left_out + [number for number, *_ in self._fresh]

    def alive(self, chunk: int, windows: int) -> Tensor | None:
        """bool [windows] of a chunk: not left out; None where all are in."""
        first = self.calibration.windows(chunk).start
        gone = [n - first for n in self.numbers if first <= n < first + windows]
        if not gone:
            return None
        found = torch.ones(windows, dtype=torch.bool)
        found[gone] = False
        return found

    def look(
        self,
        module: str,
        chunk: int,
        parts: list[Tensor],
        replay: Replay,
        walk: LayerWalk | None = None,
        end: str = "input",
    ) -> Tensor | None:
        """Leave out the windows of a chunk of which some part, [windows, ...] each, is not finite:
        parts: the input of a module, or another end of it. Returns alive() of the chunk.

        InputError when too many are left out; NumericsError when the run is strict.
        """
        if not all(all_finite(part) for part in parts):
            bad = torch.stack([_not_finite(part) for part in parts]).any(dim=0)
            rows = bad.nonzero().flatten()
            self._leave_out(module, end, chunk, rows.tolist())
            stores = [replay.hidden, replay.tape, *(replay.dense or ())]
            for store in stores:
                store.blank(chunk, rows)
            if walk is not None:
                walk.blanked()
        return self.alive(chunk, len(parts[0]))

    def _leave_out(self, module: str, end: str, chunk: int, rows: list[int]) -> None:
        first = self.calibration.windows(chunk).start
        fresh = [first + row for row in rows if first + row not in self.numbers]
        self._fresh += [(number, module, end) for number in fresh]
        if team().alone:
            self._settle()
        else:  # before any other process asks for them
            for number in fresh:
                self._judge(f"the {end} of {module}", self._which(number))

    def share(self) -> None:
        """Know what all processes have left out; to be called by all of them."""
        if not team().alone:
            told = team().gather(self._fresh)
            self._fresh = [tuple(one) for each in told for one in each]
            self._settle()

    def _settle(self) -> None:
        """What is fresh goes into the report, where it stands for good."""
        fresh, self._fresh = self._fresh, []
        self.report.left_out += [number for number, *_ in fresh]
        for number, module, end in fresh:
            which = self._which(number)
            self._judge(f"the {end} of {module}", which)
            what = f"its {end} is not finite for {which}"
            self.report.fall_back(Fallback(module, "skipped_windows", 1, what, True))

    def _which(self, number: int) -> str:
        languages = self.calibration.languages
        language = languages[number]
        before = languages[:number].count(language)
        return f"window {before + 1} of {languages.count(language)} in language {language!r}"

    def _judge(self, where: str, which: str) -> None:
        languages, left = self.calibration.languages, Counter(self.calibration.languages)
        left.subtract(languages[number] for number in self.numbers)
        empty = [language for language, count in left.items() if not count]
        if len(self.numbers) <= self.most and not empty:
            return
        why = f"more than the {self.most} that may be left out"
        if empty:
            why = f"and none is left of {', '.join(empty)}"
        raise InputError(
            f"{where} is not finite for {which}: the model overflows in its dtype on "
            f"{len(self.numbers)} of {len(languages)} calibration windows, {why}"
        )


def _not_finite(part: Tensor) -> Tensor:
    """bool [windows]."""
    least, greatest = part.detach().flatten(1).aminmax(dim=1)
    return ~(least.isfinite() & greatest.isfinite())
