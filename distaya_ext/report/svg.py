"""Pictures of our own making: SVG that scales with the page without a script.

Places across are percentages of a plot's width and sizes are pixels, so that letters stay as large
as they are on a telephone; labels beside the plot stand in margins that the style sheet leaves.
Colours are classes of the style sheet, which knows light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from .words import clean


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """An element. Attributes: class_ is class, others_ with_dashes; None leaves one out."""
    said = Markup("").join(
        Markup(' {}="{}"').format(Markup(key.rstrip("_").replace("_", "-")), _value(value))
        for key, value in attributes.items()
        if value is not None
    )
    inside = Markup("").join(
        each if isinstance(each, Markup) else escape(clean(str(each))) for each in children
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), said, inside)


def _value(value: Any) -> Any:
    if isinstance(value, float):
        text = f"{value:.2f}".rstrip("0").rstrip(".")
        return "0" if text == "-0" else text
    return value


def across(share: float) -> str:
    """A place across the plot, 0 to 1, as a percentage."""
    return f"{_value(100.0 * min(1.0, max(0.0, share)))}%"


@dataclass(frozen=True)
class Scale:
    """From numbers to places 0 to 1."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], *, zero: bool = False, log: bool = False) -> Scale:
        """A scale with room for all values; zero: and for 0. log needs positive values."""
        low, high = min(values), max(values)
        if log:
            return cls(low / 1.15, high * 1.15, True)
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        room = 0.04 * (high - low)
        if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
            room = 0.5 * max(abs(high), abs(low)) if max(abs(high), abs(low)) > 1e-9 else 0.5
        return cls(low if zero and low == 0 else low - room, high + room)

    def at(self, value: float) -> float:
        """Where a value is."""
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            return (math.log(max(value, self.low)) - low) / (high - low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, about: int = 5) -> list[float]:
        """Round numbers inside."""
        if self.log:
            return self._log_ticks(about)
        raw = (self.high - self.low) / about
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [float(f"{i * step:.12g}") for i in range(first, last + 1)]

    def _log_ticks(self, about: int) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for parts in ((1,), (1, 3), (1, 2, 5)):
            found = [m * 10.0**p for p in powers for m in parts]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) >= min(3, about):
                return found[:: -(-len(found) // about)]
        return found


def tick_text(value: float) -> str:
    """A tick's number, with a real minus sign."""
    return f"{value:.6g}".replace("-", "−").replace("e−0", "e−")


@dataclass(frozen=True)
class Plot:
    """The frame of a picture: its size, the margins beside it in pixels, and what it shows in words
    for those who cannot see it. name makes ids unique within the page.
    """

    name: str
    title: str
    description: str
    height: float
    left: int = 8
    right: int = 8

    def draw(self, *parts: Any) -> Markup:
        """The picture."""
        return tag(
            "svg",
            tag("title", self.title, id=f"{self.name}-title"),
            tag("desc", self.description, id=f"{self.name}-desc"),
            *parts,
            class_="plot",
            role="img",
            aria_labelledby=f"{self.name}-title {self.name}-desc",
            height=self.height,
            style=f"--left:{self.left}px;--right:{self.right}px",
        )

    def grid_across(self, scale: Scale, top: float, bottom: float, about: int = 5) -> Markup:
        """Upright lines at the ticks, their numbers below."""
        parts = []
        for value in scale.ticks(about):
            x = across(scale.at(value))
            zero = "zero" if value == 0 else "grid"
            parts.append(tag("line", x1=x, x2=x, y1=top, y2=bottom, class_=zero))
            number = tag("text", tick_text(value), x=x, y=bottom + 16, class_="tick middle")
            parts.append(number)
        return tag("g", *parts)

    def grid_up(self, scale: Scale, top: float, bottom: float, about: int = 4) -> Markup:
        """Level lines at the ticks, their numbers on the left."""
        parts = []
        for value in scale.ticks(about):
            y = bottom - scale.at(value) * (bottom - top)
            parts.append(tag("line", x1="0%", x2="100%", y1=y, y2=y, class_="grid"))
            text = tag("text", tick_text(value), x=-8.0, y=y + 4, class_="tick end")
            parts.append(text)
        return tag("g", *parts)


def line(points: Sequence[tuple[float, float]], top: float, bottom: float, class_: str) -> Markup:
    """A line through places (0 to 1 across, 0 to 1 up) that stretches with the plot."""
    path = " ".join(f"{_value(1000.0 * x)},{_value(1000.0 * (1 - y))}" for x, y in points)
    stretched = tag("polyline", points=path, class_=class_, vector_effect="non-scaling-stroke")
    return tag(
        "svg",
        stretched,
        x=0,
        y=top,
        width="100%",
        height=bottom - top,
        viewBox="0 0 1000 1000",
        preserveAspectRatio="none",
        overflow="visible",
    )
