"""How a user says which layers are to go."""

import pytest

from distaya_ext.errors import UsageError
from distaya_ext.influence.spec import DropSpec, parse_drop


@pytest.mark.parametrize(
    "text, found",
    [
        ("4", DropSpec(count=4)),
        (" 12 ", DropSpec(count=12)),
        ("25%", DropSpec(share=0.25)),
        ("12.5 %", DropSpec(share=0.125)),
        ("3,5", [3, 5]),
        ("5, 3", [5, 3]),
        ("3,", [3]),
        ("0,", [0]),
        ("3,5,", [3, 5]),
    ],
)
def test_a_count_a_share_or_a_list(text, found):
    assert parse_drop(text) == found


@pytest.mark.parametrize(
    "text, words",
    [
        ("0", "drops no layer"),
        ("0%", "between 0% and 100%"),
        ("100%", "between 0% and 100%"),
        ("250%", "between 0% and 100%"),
        *((text, "no list of layer numbers") for text in
          ("", ",", "abc", "-1", "1-3", "1,,2", "2.5", "%", "-5%", "1e2", "٣", "1234567")),
    ],
)  # fmt: skip
def test_what_is_neither(text, words):
    with pytest.raises(UsageError, match=words) as caught:
        parse_drop(text, "--drop")
    assert str(caught.value).startswith("--drop ") and "\n" not in str(caught.value)


def test_a_spec_says_how_many_once():
    for fields in ({}, {"count": 1, "share": 0.5}, {"count": 0}, {"share": 1.0}):
        with pytest.raises(UsageError):
            DropSpec(**fields)
