"""Languages for readers: their English names, direction of writing, and how much text there is.

The class is that of Joshi et al. 2020, "The State and Fate of Linguistic Diversity and Inclusion
in the NLP World" (arXiv 2004.09095), from 0 to 5: 5 is rich in labelled and unlabelled text.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

# class: code Name, code Name, ...
_CLASSES = {
    5: "ar Arabic, de German, en English, es Spanish, fr French, ja Japanese, zh Chinese",
    4: """ca Catalan, cs Czech, eu Basque, fa Persian, fi Finnish, hi Hindi, hr Croatian,
        hu Hungarian, it Italian, ko Korean, nl Dutch, pl Polish, pt Portuguese, ru Russian,
        sr Serbian, sv Swedish, tr Turkish, vi Vietnamese""",
    3: """af Afrikaans, be Belarusian, bg Bulgarian, bn Bengali, bs Bosnian, ceb Cebuano, da Danish,
        el Greek, et Estonian, fil Filipino, gl Galician, he Hebrew, id Indonesian, ka Georgian,
        kk Kazakh, la Latin, lt Lithuanian, lv Latvian, ms Malay, ro Romanian, sk Slovak,
        sl Slovenian, ta Tamil, th Thai, tl Tagalog, uk Ukrainian, ur Urdu, uz Uzbek""",
    2: """am Amharic, ga Irish, ha Hausa, ht Haitian Creole, is Icelandic, lo Lao, mr Marathi,
        mt Maltese, pa Punjabi, sa Sanskrit, sw Swahili, ti Tigrinya, tn Tswana, wo Wolof, xh Xhosa,
        yo Yoruba, zu Zulu""",
    1: """as Assamese, az Azerbaijani, br Breton, ckb Central Kurdish, cy Welsh, eo Esperanto,
        gd Scottish Gaelic, gu Gujarati, hy Armenian, ig Igbo, jv Javanese, km Khmer, kn Kannada,
        ky Kyrgyz, lb Luxembourgish, mg Malagasy, mi Maori, mk Macedonian, ml Malayalam,
        mn Mongolian, my Burmese, ne Nepali, no Norwegian, ny Chichewa, or Odia, rw Kinyarwanda,
        sd Sindhi, sm Samoan, sn Shona, so Somali, sq Albanian, su Sundanese, te Telugu, tg Tajik,
        yi Yiddish""",
    0: "ps Pashto, si Sinhala, st Southern Sotho",
}
_SCRIPTS = {
    "Latn": "Latin", "Cyrl": "Cyrillic", "Grek": "Greek", "Arab": "Arabic", "Hebr": "Hebrew",
    "Deva": "Devanagari", "Beng": "Bengali", "Guru": "Gurmukhi", "Gujr": "Gujarati",
    "Orya": "Odia", "Taml": "Tamil", "Telu": "Telugu", "Knda": "Kannada", "Mlym": "Malayalam",
    "Sinh": "Sinhala", "Thai": "Thai", "Laoo": "Lao", "Mymr": "Burmese", "Khmr": "Khmer",
    "Tibt": "Tibetan", "Geor": "Georgian", "Armn": "Armenian", "Ethi": "Ethiopic", "Hani": "Han",
    "Hang": "Hangul", "Thaa": "Thaana", "Syrc": "Syriac", "Nkoo": "N'Ko",
}  # fmt: skip
_LEFTWARD = {"Arab", "Hebr", "Thaa", "Syrc", "Nkoo"}
_RICHNESS = {5: "high", 4: "high", 3: "mid", 2: "low", 1: "low", 0: "low"}


class Tongue(NamedTuple):
    """A language. direction: "rtl", "ltr" or "auto" where the code says nothing."""

    code: str
    name: str
    script: str | None
    direction: str
    resources: str | None


@functools.cache
def tongue(code: str) -> Tongue:
    """What is known of a language code; an unknown one is its own name."""
    from ..evaluate.scripts import scripts_of

    first = code.partition("-")[0]
    name, richness = _table().get(first, (code, None))
    if first != code and name != code:
        name = f"{name} ({code.partition('-')[2]})"
    scripts = scripts_of(code)
    if not scripts:
        return Tongue(code, name, None, "auto", richness)
    script = ", ".join(_SCRIPTS.get(each, each) for each in scripts)
    direction = "rtl" if scripts[0] in _LEFTWARD else "ltr"
    return Tongue(
        code, name, {"Han, Hira, Kana": "Kana, Han"}.get(script, script), direction, richness
    )


@functools.cache
def _table() -> dict[str, tuple[str, str]]:
    found = {}
    for level, languages in _CLASSES.items():
        for each in languages.split(","):
            code, _, name = each.strip().partition(" ")
            found[code] = (name, _RICHNESS[level])
    return found
