"""Scripts of languages, and letters in wrong ones."""

from pathlib import Path

import pytest
import regex

import distaya_ext
from distaya_ext.evaluate import scripts
from distaya_ext.evaluate.scripts import Letters, letters, scripts_of

TEXTS = Path(distaya_ext.__file__).parent / "assets" / "texts" / "evaluation"
KNOWN = {
    "en": "Latn", "ru": "Cyrl", "zh": "Hani", "zh-Hant": "Hani Bopo", "zh-TW": "Hani",
    "ja": "Hani Hira Kana", "ko": "Hang", "ko-Kore": "Hang Hani", "sr": "Cyrl Latn",
    "sr-Latn": "Latn", "sr-Cyrl-ME": "Cyrl", "uz": "Cyrl Latn", "pa": "Guru", "pa-PK": "Arab",
    "pa-Guru-PK": "Guru", "hi": "Deva", "fa": "Arab", "he": "Hebr", "el": "Grek", "th": "Thai",
    "am": "Ethi", "ka": "Geor", "hy": "Armn", "ta": "Taml", "my": "Mymr", "km": "Khmr",
    "sw": "Latn", "mn": "Cyrl", "mn-CN": "Mong", "vi": "Latn", "eng": "Latn", "deu": "Latn",
    "zho": "Hani", "hin": "Deva", "yi": "Hebr", "ckb": "Arab", "ku": "Latn", "dv": "Thaa",
}  # fmt: skip


@pytest.mark.parametrize("code", KNOWN)
def test_languages_and_their_scripts(code):
    assert set(scripts_of(code)) == set(KNOWN[code].split())


@pytest.mark.parametrize("code", ["xx", "qqq", "en-Qqqq", "en-Zyyy", "en-Zxxx"])
def test_what_is_not_known_is_not_guessed(code):
    assert scripts_of(code) is None


def test_the_table_is_whole():
    codes = [code for line in scripts._WRITTEN.values() for code in line.split()]
    assert len(codes) == len(set(codes)) > 250
    for line in [*scripts._WRITTEN, *scripts._REGIONS.values(), *scripts._JOINED.values()]:
        for script in line.split():
            assert regex.compile(rf"\p{{sc={script}}}")
    short = scripts._table_of_three()
    assert len(short) == len(scripts._THREE.split()) > 150
    assert all(scripts_of(code) == scripts_of(two) for code, two in short.items())
    assert all(scripts_of(two) for two in short.values())


@pytest.mark.parametrize(
    ("text", "language", "counted"),
    [
        ("Hello, мир!", "en", Letters(8, 3)),
        ("Hello, мир!", "ru", Letters(8, 5)),
        ("漢字とカタカナ、ラーメン", "ja", Letters(10, 0)),  # the long vowel mark is nobody's
        ("漢字とカタカナ", "zh", Letters(7, 5)),
        ("한국어 中文", "ko", Letters(5, 2)),
        ("हिन्दी में code", "hi", Letters(8, 4)),  # vowel signs are no letters
        ("Ово је ovo je", "sr", Letters(10, 0)),
        ("1 + 2 = 3 ☺ \ufffd", "en", Letters(0, 0)),
        ("𐌰𝒜", "en", Letters(1, 1)),  # Gothic counts, a mathematical letter is nobody's
    ],
)
def test_letters_are_counted(text, language, counted):
    assert letters(text, scripts_of(language)) == counted
    assert letters("x" + text, ("Grek",)).wrong == counted.all + 1


def test_real_texts_are_in_their_scripts():
    for path in TEXTS.glob("*.txt"):
        found = letters(path.read_text(encoding="utf-8"), scripts_of(path.stem))
        assert found.all > 500 and found.wrong == 0, path.stem
