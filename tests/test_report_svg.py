"""The parts of a page: scales and pictures, words and numbers, what is known of languages."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from report_case import Page

from distaya_ext.report import charts, svg
from distaya_ext.report.charts import Bar, Dot, Line
from distaya_ext.report.svg import Scale
from distaya_ext.report.tongues import tongue
from distaya_ext.report.words import (
    clean,
    duration,
    number,
    parted,
    pathless,
    plain_name,
    significant,
)

NUMBERS = st.floats(-1e12, 1e12, allow_nan=False)


@given(st.lists(NUMBERS, min_size=1, max_size=8), st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_scale_holds_its_values_and_ticks(values, zero):
    scale = Scale.over(values, zero=zero)
    assert all(0 <= scale.at(value) <= 1 for value in values)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 12 and ticks == sorted(set(ticks))
    assert all(-1e-6 <= scale.at(tick) <= 1 + 1e-6 for tick in ticks)


def test_ticks_are_round():
    assert Scale(0.0, 0.31).ticks() == [0.0, 0.1, 0.2, 0.3]
    assert Scale(-0.06, 0.19).ticks() == [-0.05, 0.0, 0.05, 0.1, 0.15]
    assert Scale(0, 7).ticks(8) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_tags_escape():
    made = svg.tag("text", "<b>&", Markup("<i/>"), class_='a"b', stroke_width=1.5, x=None)
    assert made == '<text class="a&#34;b" stroke-width="1.5">&lt;b&gt;&amp;<i/></text>'


def test_dots_stand_where_their_numbers_are():
    """The worst first; a circle at its share of the scale, English as a diamond with its line."""
    rows = [
        Dot("Swahili", 0.4, (0.3, 0.5), "×1.5", "worst"),
        Dot("English", 0.1, (0.0, 0.2), "×1.1", "english"),
    ]
    page = Page(charts.dots(rows, "lost", "nats", zero=True))
    assert page.problems == []
    scale = Scale.over([0.3, 0.5, 0.0, 0.2, 0.4, 0.1], zero=True)
    (circle,) = page.all("circle")
    assert float(circle["cx"].rstrip("%")) == pytest.approx(100 * scale.at(0.4), abs=0.01)
    (upright,) = [a for a in page.all("line") if a["class"] == "english-line"]
    assert float(upright["x1"].rstrip("%")) == pytest.approx(100 * scale.at(0.1), abs=0.01)
    whiskers = [a for a in page.all("line") if a["class"] == "whisker" and a["x1"] != a["x2"]]
    ends = [(float(a["x1"].rstrip("%")), float(a["x2"].rstrip("%"))) for a in whiskers]
    wanted = [(100 * scale.at(low), 100 * scale.at(high)) for low, high in ((0.3, 0.5), (0.0, 0.2))]
    assert ends == [pytest.approx(pair, abs=0.01) for pair in wanted]
    assert "Swahili: +0.400, 95 % interval +0.300 to +0.500" in page.text


def test_a_map_is_fuller_where_more_was_lost():
    page = Page(charts.heat({"q": {0: 0.1, 1: 0.2}, "k": {1: 0.4}}, "loss", "error"))
    fields = [float(a["fill-opacity"]) for a in page.all("rect")]
    assert fields == sorted(fields) and len(fields) == 3 and fields[-1] == 1.0
    assert "0.400 in k of layer 1" in page.text


def test_lines_go_through_their_points():
    one = Line("worst", [(0.0, 0.0), (1.0, 1.0), (2.0, 0.5)], "worst", dots=True)
    page = Page(charts.lines("x", [one], "a title", "layer"))
    (stroke,) = page.all("polyline")
    points = [tuple(map(float, pair.split(","))) for pair in stroke["points"].split()]
    assert [x for x, _ in points] == [0, 500, 1000]
    ups = [1000 - y for _, y in points]
    assert ups[0] == 0 < ups[2] < ups[1] and ups[2] == pytest.approx(ups[1] / 2, abs=1)
    assert len(page.all("circle")) == 3


def test_degenerate_pictures_are_still_pictures():
    flat = Line("one", [(3.0, 0.0)], "other")
    made = [
        charts.lines("a", [flat], "t", "x"),
        charts.heat({"q": {0: 0.0}}, "t", "w"),
        charts.stack([Bar("nothing", 0)], "t", "w"),
        charts.bar(0, 0),
        charts.dots([Dot("x", 0.0, None, "")], "t", "u", zero=True),
    ]
    for each in made:
        assert Page(each).problems == [] and "nan" not in each and "inf" not in each


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_clean_text_can_be_written_and_read(text):
    """Nothing is left that steers a terminal, a parser or the direction of what comes after."""
    made = clean(text)
    made.encode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", made)
    assert clean(made) == made


def test_clean_keeps_what_is_writing():
    for text in ("می\u200cخواهم", "नमस्ते\u200d", "日本語", "a\tb\nc", "שלום\u200f"):
        assert clean(text) == text
    assert clean("abc\ud800", 10) == "abc⟨U+D800⟩"
    assert clean("x" * 50, 10) == "x" * 10 + " … (40 more characters)"


@pytest.mark.parametrize(
    ("text", "other", "same", "own"),
    [
        ("the cat sat", "the cat ran", "the cat ", "sat"),
        ("the cart", "the cat", "the ", "cart"),
        ("same", "same", "same", ""),
        ("日本語です", "日本人です", "日本", "語です"),
        ("alone", None, "", "alone"),
        ("", "x", "", ""),
    ],
)
def test_where_two_continuations_part(text, other, same, own):
    assert parted(text, other) == (same, own)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home-of/someone/aya-8b", "aya-8b"),
        ("~/models/aya/", "aya"),
        ("../aya", "aya"),
        ("some/where/aya", "aya"),
        (r"C:\models\aya", "aya"),
        ("CohereLabs/aya-expanse-8b", "CohereLabs/aya-expanse-8b"),
        ("aya", "aya"),
        ("/", "a local folder"),
    ],
)
def test_names_without_the_way_to_them(name, shown):
    assert plain_name(name) == shown


def test_sentences_without_paths():
    said = "texts in /srv/data/x/sw.txt ran out, see https://a.b/c/d and 3/4"
    assert pathless(said) == "texts in sw.txt ran out, see https://a.b/c/d and 3/4"


def test_numbers():
    assert number(-0.0004, 3, sign=True) == "+0.000" and number(-0.1) == "−0.100"
    assert number(None) == "–" and number(12345.6, 1) == "12,345.6"
    assert [significant(x) for x in (0, 0.0123456, 4.5678, 12345.0, 1e-9)] == [
        "0", "0.0123", "4.57", "12,345", "1.00e−09",
    ]  # fmt: skip
    assert [duration(s) for s in (1.23, 75, 7500)] == ["1.2 s", "1 min 15 s", "2 h 05 min"]


def test_languages():
    arabic, serbian = tongue("ar"), tongue("sr-Latn")
    assert (arabic.name, arabic.direction, arabic.resources) == ("Arabic", "rtl", "high")
    assert (serbian.name, serbian.script, serbian.direction) == ("Serbian (Latn)", "Latin", "ltr")
    assert tongue("ja").script == "Kana, Han"
    assert tongue("xx-nothing") == ("xx-nothing", "xx-nothing", None, "auto", None)
    assert {tongue(code).direction for code in ("he", "fa", "ur", "yi", "ps")} == {"rtl"}
