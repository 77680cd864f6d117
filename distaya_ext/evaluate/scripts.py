"""Which scripts a language is written in, and how much of a text is in others.

The scripts are those of CLDR's likely subtags, with the second script where a language is printed
in two (Serbian, Uzbek); the script of a letter is Unicode's property Script, as the `regex`
package has it. Letters that belong to no script or to many (the long vowel mark of Japanese, the
modifier apostrophe) count nowhere, and neither do digits, marks and signs.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

# Scripts by ISO 15924 code: languages by ISO 639 code, the two letters where there are two.
_WRITTEN = {
    "Latn": """
        af ak an ast ay bci bm br ca ceb ch co cs cy da de dyu ee en eo es et eu ewo fi
        fil fj fo fon fr frp fur fy ga gaa gd gl gn gsw gv ha haw hil hr ht hu ia id ig ilo io is it
        jv kab kg ki kl kmb kri ksh kw la lb lg li lij lmo ln lt ltg lua luo lus lv mad mg mi min
        moh mos ms mt na nap nb nds nl nn no nso nv ny oc om pag pam pap pcm pl pt
        qu rm rn ro rw sc scn sco se sg sk sl sm sn so sq srn ss st su sv sw szl tet
        tk tl tn to tpi tr ts tum ty ve vec vi vo vro wa war wo xh yo za zu bbc ban bug ace bew
        quy qug qus ayr kea mfe gcr rup hsb dsb ku diq kmr""",
    "Cyrl": "ab av ba be bg ce chm cv kk kv ky mk mn myv mhr os ru rue sah tg tt tyv udm uk xal",
    "Cyrl Latn": "sr bs sh uz cnr crh",
    "Latn Cyrl": "az gag",
    "Grek": "el grc",
    "Arab": "ar fa ps ur ug ckb glk mzn sd ks pnb skr azb lrc bal prs arz ary apc ajp acm aeb ars",
    "Hebr": "he yi lad",
    "Deva": "hi mr ne sa mai bho awa hne kok gom new brx doi mag raj bgc",
    "Beng": "bn as bpy",
    "Beng Mtei": "mni",
    "Guru": "pa",
    "Gujr": "gu",
    "Orya": "or",
    "Taml": "ta",
    "Telu": "te",
    "Knda": "kn tcy",
    "Mlym": "ml",
    "Sinh": "si",
    "Thai": "th",
    "Laoo": "lo",
    "Mymr": "my shn mnw ksw",
    "Khmr": "km",
    "Tibt": "bo dz",
    "Geor": "ka xmf",
    "Armn": "hy hyw",
    "Ethi": "am ti gez",
    "Hani": "zh yue wuu gan hak lzh cmn nan",
    "Hani Hira Kana": "ja",
    # Hanja is left out on purpose: little of today's Korean has any, and a model that slips into
    # Chinese is what the rate is there to catch. ko-Kore counts them in.
    "Hang": "ko",
    "Thaa": "dv",
    "Olck": "sat",
    "Cher": "chr",
    "Cans": "iu cr oj",
    "Tfng": "zgh",
    "Tfng Latn": "ber tzm taq",
    "Syrc": "syr aii",
    "Nkoo": "nqo",
    "Vaii": "vai",
    "Yiii": "ii",
}
# Where a region, in a tag such as pa-PK, decides the script.
_REGIONS = {
    "pa-PK": "Arab", "az-IR": "Arab", "uz-AF": "Arab", "kk-CN": "Arab", "ku-IQ": "Arab",
    "ky-CN": "Arab", "mn-CN": "Mong", "ha-SD": "Arab", "sd-IN": "Deva", "tg-PK": "Arab",
    "sr-ME": "Latn Cyrl",
}  # fmt: skip
# Codes of ISO 15924 that stand for several scripts of Unicode.
_JOINED = {
    "Hans": "Hani", "Hant": "Hani Bopo", "Hanb": "Hani Bopo", "Jpan": "Hani Hira Kana",
    "Hrkt": "Hira Kana", "Kore": "Hang Hani", "Aran": "Arab", "Latf": "Latn", "Latg": "Latn",
    "Cyrs": "Cyrl", "Geok": "Geor", "Syre": "Syrc",
}  # fmt: skip
# Three letters of ISO 639-3 (and their older bibliographic forms) for languages that have two.
_THREE = """
    afr:af aka:ak amh:am ara:ar arb:ar asm:as aym:ay aze:az azj:az bak:ba bel:be ben:bn bod:bo
    bos:bs bre:br bul:bg cat:ca ces:cs cze:cs che:ce chv:cv cos:co cym:cy wel:cy dan:da deu:de
    ger:de div:dv dzo:dz ell:el gre:el eng:en epo:eo est:et ekk:et eus:eu baq:eu ewe:ee fao:fo
    fas:fa per:fa pes:fa fij:fj fin:fi fra:fr fre:fr fry:fy gla:gd gle:ga glg:gl grn:gn guj:gu
    hat:ht hau:ha heb:he hin:hi hrv:hr hun:hu hye:hy arm:hy ibo:ig iku:iu ind:id isl:is ice:is
    ita:it jav:jv jpn:ja kal:kl kan:kn kas:ks kat:ka geo:ka kaz:kk khm:km khk:mn kik:ki kin:rw
    kir:ky kor:ko kur:ku lao:lo lat:la lav:lv lvs:lv lim:li lin:ln lit:lt ltz:lb lug:lg mal:ml
    mar:mr mkd:mk mac:mk mlg:mg plt:mg mlt:mt mon:mn mri:mi mao:mi msa:ms zsm:ms may:ms mya:my
    bur:my nep:ne npi:ne nld:nl dut:nl nno:nn nob:nb nor:no nya:ny oci:oc ori:or ory:or orm:om
    gaz:om oss:os pan:pa pol:pl por:pt pus:ps pbt:ps que:qu roh:rm ron:ro rum:ro run:rn rus:ru
    sag:sg san:sa sin:si slk:sk slo:sk slv:sl sme:se smo:sm sna:sn snd:sd som:so sot:st spa:es
    sqi:sq alb:sq als:sq srd:sc srp:sr ssw:ss sun:su swa:sw swh:sw swe:sv tah:ty tam:ta tat:tt
    tel:te tgk:tg tgl:tl tha:th tir:ti ton:to tsn:tn tso:ts tuk:tk tur:tr twi:ak uig:ug ukr:uk
    urd:ur uzb:uz uzn:uz ven:ve vie:vi wln:wa wol:wo xho:xh ydd:yi yid:yi yor:yo zho:zh chi:zh
    zul:zu iw:he in:id ji:yi mo:ro tw:ak"""


class Letters(NamedTuple):
    """How many letters of a text belong to some script, and how many of them to a wrong one."""

    all: int
    wrong: int

    def __add__(self, other: Letters) -> Letters:
        return Letters(self.all + other.all, self.wrong + other.wrong)


def scripts_of(language: str) -> tuple[str, ...] | None:
    """Scripts of a language code, ISO 15924: sr -> (Cyrl, Latn), pa-PK -> (Arab,).

    A script in the code decides (sr-Latn, zh-Hant), then a region where it matters; None for a
    language that is not in the table.
    """
    first, *rest = language.split("-")
    first = _table_of_three().get(first.lower(), first.lower())
    for part in rest:
        if len(part) == 4 and part.isalpha():
            code = part.title()
            found = _JOINED.get(code, code).split()
            return tuple(found) if all(map(_known, found)) else None
    for part in rest:
        if found := _REGIONS.get(f"{first}-{part.upper()}"):
            return tuple(found.split())
    return _table().get(first)


def letters(text: str, scripts: tuple[str, ...]) -> Letters:
    """Count the letters of a text, and those outside the scripts."""
    ours, wrong = _patterns(scripts)
    strange = len(wrong.findall(text))
    return Letters(len(ours.findall(text)) + strange, strange)


@functools.cache
def _table() -> dict[str, tuple[str, ...]]:
    return {
        language: tuple(scripts.split())
        for scripts, languages in _WRITTEN.items()
        for language in languages.split()
    }


@functools.cache
def _table_of_three() -> dict[str, str]:
    return dict(pair.split(":") for pair in _THREE.split())


@functools.cache
def _patterns(scripts: tuple[str, ...]) -> tuple:
    import regex

    inside = "".join(rf"\p{{sc={script}}}" for script in scripts)
    nobody = r"\p{sc=Zyyy}\p{sc=Zinh}"
    return (
        regex.compile(rf"[\p{{L}}&&[{inside}]]", regex.V1),
        regex.compile(rf"[\p{{L}}--[{inside}{nobody}]]", regex.V1),
    )


@functools.cache
def _known(script: str) -> bool:
    import regex

    try:
        regex.compile(rf"\p{{sc={script}}}")
    except regex.error:
        return False
    return script not in ("Zyyy", "Zinh", "Zzzz")
