"""The pictures of the page: dots with intervals, a map of layers, lines, bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from .svg import Plot, Scale, across, line, tag, tick_text
from .words import interval, number, significant

_ROW = 22  # pixels of a language


class Dot(NamedTuple):
    """A language in the dot plot. role: "worst", "english" or ""."""

    label: str
    value: float
    low_high: tuple[float, float] | None
    text: str
    role: str = ""


def dots(dots: Sequence[Dot], title: str, unit: str, *, zero: bool) -> Markup:
    """One line per language in the order given, with its interval; English is a diamond with an
    upright line through the plot.
    """
    ends = [end for dot in dots for end in (dot.low_high or (dot.value,))]
    scale = Scale.over([*ends, *(dot.value for dot in dots)], zero=zero)
    top, bottom = 4.0, 4.0 + _ROW * len(dots)
    first = dots[0]
    words = f"{unit}. First {first.label}: {number(first.value)}, {interval(first.low_high)}."
    label = max(len(dot.label) for dot in dots)
    plot = Plot("dots", title, words, bottom + 40, left=min(150, 16 + 7 * label), right=52)
    parts = [plot.grid_across(scale, top, bottom)]
    for english in (dot for dot in dots if dot.role == "english"):
        x = across(scale.at(english.value))
        parts.append(tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="english-line"))
    for place, dot in enumerate(dots):
        parts.append(_dot(dot, scale, top + _ROW * (place + 0.5)))
    parts.append(tag("text", unit, x="50%", y=bottom + 34, class_="tick middle"))
    return plot.draw(*parts)


def _dot(dot: Dot, scale: Scale, y: float) -> Markup:
    x = across(scale.at(dot.value))
    told = f"{dot.label}: {number(dot.value, sign=True)}, 95 % interval {interval(dot.low_high)}"
    parts = [tag("title", told)]
    parts.append(tag("text", dot.label, x=-10.0, y=y + 4, class_="label end"))
    if dot.low_high is not None:
        low, high = (across(scale.at(end)) for end in dot.low_high)
        parts.append(tag("line", x1=low, x2=high, y1=y, y2=y, class_="whisker"))
        for end in (low, high):
            parts.append(tag("line", x1=end, x2=end, y1=y - 3, y2=y + 3, class_="whisker"))
    if dot.role == "english":
        diamond = tag("path", d="M0,-6.5L6.5,0L0,6.5L-6.5,0Z", class_="mark")
        parts.append(tag("svg", diamond, x=x, y=y, overflow="visible", width=1, height=1))
    else:
        radius = 5.5 if dot.role == "worst" else 4.0
        parts.append(tag("circle", cx=x, cy=y, r=radius, class_="mark"))
    parts.append(tag("text", dot.text, x="100%", dx=8, y=y + 4, class_="value"))
    return tag("g", *parts, class_=f"dot {dot.role}".strip())


def heat(table: Mapping[str, Mapping[int, float]], title: str, what: str) -> Markup:
    """Kinds of modules by layers; the larger a number the fuller its field."""
    layers = sorted({layer for row in table.values() for layer in row})
    values = [value for row in table.values() for value in row.values()]
    high = max(values) or 1.0
    row, top = 24, 4
    bottom = top + row * len(table)
    at, name, worst = max(
        ((layer, name, value) for name, each in table.items() for layer, value in each.items()),
        key=lambda found: found[2],
    )
    words = f"{what}. The most: {significant(worst)} in {name} of layer {at}."
    width = max(len(name) for name in table)
    plot = Plot("heat", title, words, bottom + 40, left=16 + 7 * width, right=8)
    parts = []
    for line_, (name, each) in enumerate(table.items()):
        y = top + row * line_
        parts.append(tag("text", name, x=-10.0, y=y + row / 2 + 4, class_="label end"))
        for place, layer in enumerate(layers):
            if layer not in each:
                continue
            told = tag("title", f"layer {layer} {name}: {significant(each[layer])}")
            field = tag(
                "rect", told, x=across(place / len(layers)), y=y + 1, rx=2,
                width=across(1 / len(layers)), height=row - 2,
                class_="field", fill_opacity=0.06 + 0.94 * each[layer] / high,
            )  # fmt: skip
            parts.append(field)
    step = -(-len(layers) // 16)
    for place, layer in list(enumerate(layers))[::step]:
        x = across((place + 0.5) / len(layers))
        parts.append(tag("text", str(layer), x=x, y=bottom + 16, class_="tick middle"))
    parts.append(tag("text", "layer", x="50%", y=bottom + 34, class_="tick middle"))
    return plot.draw(*parts)


class Line(NamedTuple):
    """A line in a plot. role: a class, such as "worst", "english" or "other"."""

    label: str
    points: Sequence[tuple[float, float]]
    role: str = "other"
    dots: bool = False


def lines(
    name: str, lines: Sequence[Line], title: str, across_text: str, *, whole: bool = True
) -> Markup:
    """Lines over layers or steps, the lowest number at the bottom; the last ones lie on top and
    those with a role have their label beside their end.
    """
    xs = [x for each in lines for x, _ in each.points]
    ys = [y for each in lines for _, y in each.points]
    low, high = min(xs), max(xs)
    wide = Scale(low, high) if high > low else Scale(low - 1, high + 1)
    tall = Scale.over(ys, zero=min(ys) >= 0 and min(ys) < 0.4 * max(ys))
    top, bottom = 8.0, 188.0
    words = "; ".join(
        f"{each.label} from {significant(each.points[0][1])} to {significant(each.points[-1][1])}"
        for each in lines
        if each.role != "other"
    )
    named = [each for each in lines if each.role != "other"]
    right = max((18 + 7 * len(each.label) for each in named), default=8)
    plot = Plot(name, title, words, bottom + 40, left=54, right=min(right, 120))
    parts = [plot.grid_up(tall, top, bottom)]
    for value in wide.ticks(8):
        if whole and value != int(value):
            continue
        text = tag(
            "text", tick_text(value), x=across(wide.at(value)), y=bottom + 16, class_="tick middle"
        )
        parts.append(text)
    for each in lines:
        parts.append(_line(each, wide, tall, top, bottom))
    parts.extend(_ends(named, tall, top, bottom))
    parts.append(tag("text", across_text, x="50%", y=bottom + 34, class_="tick middle"))
    return plot.draw(*parts)


def _line(each: Line, wide: Scale, tall: Scale, top: float, bottom: float) -> Markup:
    places = [(wide.at(x), tall.at(y)) for x, y in each.points]
    parts = [line(places, top, bottom, "stroke"), tag("title", each.label)]
    if each.dots or len(places) == 1:
        for x, y in places:
            place = bottom - y * (bottom - top)
            parts.append(tag("circle", cx=across(x), cy=place, r=3.5, class_="mark"))
    return tag("g", *parts, class_=f"line {each.role}")


def _ends(named: Sequence[Line], tall: Scale, top: float, bottom: float) -> list[Markup]:
    """Labels at the ends of lines, at least a letter's height apart."""
    places = sorted((bottom - tall.at(each.points[-1][1]) * (bottom - top), each) for each in named)
    parts, last = [], -1e9
    for y, each in places:
        last = max(y, last + 14)
        label = tag("text", each.label, x="100%", dx=8, y=last + 4, class_="label")
        parts.append(tag("g", label, class_=f"line {each.role}"))
    return parts


class Bar(NamedTuple):
    """A bar of a share of the whole width. role: a class for its colour."""

    label: str
    value: float
    role: str = ""


def bar(value: float, most: float, role: str = "") -> Markup:
    """One bar, for the cell of a table that says the number beside it."""
    share = value / most if most > 0 else 0.0
    inside = tag("rect", x=0, y=0, rx=2, width=across(share), height=10, class_="bar")
    return tag("svg", inside, class_=f"cell {role}".strip(), height=10, aria_hidden="true")


def stack(bars: Sequence[Bar], title: str, what: str) -> Markup:
    """Parts of a whole, side by side; the table beside it names them."""
    total = sum(each.value for each in bars) or 1.0
    words = what + ": " + ", ".join(f"{b.label} {100 * b.value / total:.1f} %" for b in bars)
    plot, parts, x = Plot("parts", title, words, 30), [], 0.0
    for each in bars:
        told = tag("title", f"{each.label}: {100 * each.value / total:.1f} %")
        parts.append(
            tag(
                "rect", told, x=across(x / total), y=4, width=across(each.value / total), height=22,
                class_=f"part {each.role}".strip(),
            )
        )  # fmt: skip
        x += each.value
    return plot.draw(*parts)
