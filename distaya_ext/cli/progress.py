"""Progress on stderr: a bar with the time left on a terminal, plain heartbeat lines elsewhere."""

from __future__ import annotations

import sys
import time

from rich import box
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..chain.events import StepFinished, StepStarted
from ..compress import events
from ..influence.events import Measured
from .output import console, size

_HEARTBEAT_SECONDS = 10.0


class Reporter:
    """Takes the driver's events and the evaluation's counts. Use as a context manager."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.terminal = sys.stderr.isatty() and not quiet
        self._console = console(err=True)
        self._bar: Progress | None = None
        self._task: int | None = None
        self._what = ""
        self._start = time.monotonic()
        self._last = -_HEARTBEAT_SECONDS  # the first sign of life comes at once
        self._worst: tuple[float, str] | None = None
        self._languages = ""

    def __enter__(self) -> Reporter:
        if self.terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
                console=self._console,
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """A line that stays, unless quiet."""
        if not self.quiet:
            self._console.print(line, markup=False, soft_wrap=True)

    def on_event(self, event: events.Event) -> None:
        """What compress() calls."""
        match event:
            case events.Notice(message):
                self.say(f"note: {message}")
            case events.Calibrated():
                self._calibrated(event)
            case events.Proved(layers=layers, max_abs_diff=diff):
                self.say(
                    f"replay of {layers} layers reproduces the model's own logits (max "
                    f"difference {diff:g})"
                )
            case events.Planned(form, count):
                self.say(f"packed as {form}, about {size(count)}")
            case events.Resumed(done, layers):
                self.say(f"going on: {done} of {layers} layers are kept from before")
            case events.LayerStart(layer, layers):
                self._worst = None
                if layer == 0 or self._bar is not None:
                    self._advance("layers", layer, layers)
            case events.StageDone():
                self._stage(event)
            case events.LanguagesDone(shares=shares, errors=errors):
                self._languages = _most_lost(shares, errors)
            case events.LayerDone(layer, layers, seconds):
                worst = (
                    f", largest relative loss {self._worst[0]:.2e} ({self._worst[1]})"
                    if self._worst
                    else ""
                )
                # A bar of 80 columns has no room for the details.
                told = f"{seconds:.1f} s{worst}{self._languages}"
                detail = "" if self._bar is not None else told
                self._advance("layers", layer + 1, layers, detail, always=True)
            case StepStarted(number, steps, name):
                self.say(f"step {number} of {steps}: {name}")
            case StepFinished(number, steps, name, seconds, kept):
                how = "was done before" if kept else "done"
                self.say(f"step {number} of {steps}: {name} {how} in {seconds:.1f} s")
            case Measured(done, total, what):
                self._advance("forwards", done, total, what, always=done == total)
            case events.FellBack():
                self._fell_back(event)
            case events.Saved(_, shards, count):
                self.say(f"{shards} shard{'s' * (shards > 1)}, {size(count)}")

    def _fell_back(self, event: events.FellBack) -> None:
        """Quiet or not: what is degraded is told, and what is normal unless quiet."""
        for line, degraded in event.lines:
            if degraded or not self.quiet:
                how = "degraded: " if degraded else "note: "
                self._console.print(
                    how + line, style="red" if degraded else None, markup=False, soft_wrap=True
                )
        if event.total:
            self._console.print(alarm(event.degraded, event.of))

    def _calibrated(self, event: events.Calibrated) -> None:
        languages = event.tokens_per_language
        self.say(
            f"calibration: {event.tokens} tokens in windows of {event.window}, "
            f"{len(languages)} languages"
        )
        if event.fertility:
            each = (f"{lang} {value:.2f}" for lang, value in sorted(event.fertility.items()))
            self.say("tokens per character: " + ", ".join(each))

    def on_progress(self, done: int, total: int, what: str) -> None:
        """What evaluate() calls: tokens scored, tokens in all, language."""
        self._advance("tokens", done, total, what, always=done == total)

    def on_search(self, done: int, total: int, what: str) -> None:
        """What search() calls after each measurement."""
        self._advance("measurements", done, total, what, always=done == total)

    def on_layers(self, done: int, total: int, what: str) -> None:
        """What make_student() calls after each layer it looked at."""
        self._advance(f"layers ({what})", done, total, always=done == total)

    def on_module(self, done: int, total: int, name: str) -> None:
        """What export() calls after each module."""
        self._advance("modules", done, total, always=done == total)

    def _stage(self, event: events.StageDone) -> None:
        short = ", ".join(name.rsplit(".", 1)[-1].removesuffix("_proj") for name in event.names)
        if event.relative_loss is not None and (
            not self._worst or event.relative_loss > self._worst[0]
        ):
            self._worst = (event.relative_loss, short)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"layer {event.layer + 1}: {short}")
        elif self._due():
            self.say(f"layer {event.layer + 1}: {short} done in {event.seconds:.1f} s")

    def _advance(
        self, what: str, done: int, total: int, detail: str = "", always: bool = False
    ) -> None:
        if what != self._what or done == 0:
            self._what, self._start, self._task = what, time.monotonic(), None
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(what, total=total)
            self._bar.update(
                self._task, completed=done, total=total, description=f"{what} {detail}".strip()
            )
        elif done and (always or self._due()):
            spent = time.monotonic() - self._start
            left = spent / done * (total - done)
            tail = f", {detail}" if detail else ""
            self.say(f"{what} {done}/{total}{tail}, {spent:.0f} s spent, {left:.0f} s left")

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self._last < _HEARTBEAT_SECONDS:
            return False
        self._last = now
        return True


def alarm(degraded: int, of: int) -> Panel:
    """What nobody can overlook: most of a run is degraded."""
    text = (
        f"{degraded} of {of} modules are degraded: the numbers of this run failed as a whole, and "
        "the result must not be used before the reason is known. Look at the lines above, at "
        "layers.csv and at fallbacks in results.json; --strict stops such a run (exit 4)."
    )
    return Panel(text, title="numerical failure", border_style="bold red", box=box.DOUBLE)


def _most_lost(shares: dict[str, float], errors: dict[str, float]) -> str:
    """Which language a layer's output has moved most in, and what it counts beside an equal one."""
    if not errors:
        return ""
    worst = max(errors, key=errors.__getitem__)
    return f", most moved {worst} {errors[worst]:.2e} (weight {shares[worst] * len(shares):.2f})"
