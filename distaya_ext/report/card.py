"""README.md of a folder: a model card of facts, with the front matter that hubs read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from ..checkpoint.readme import CARD, SOURCE, is_card, seal
from ..durable import write_whole
from ..errors import DistayaError
from . import view_languages, view_more, view_run, view_verdict
from .facts import Facts
from .page import environment
from .words import clean

# What of the source's front matter is still true of what was made from it.
_CARRIED = ("license", "license_name", "license_link", "language", "base_model", "pipeline_tag")
_MOST_BYTES = 1 << 16  # of a front matter
_MOST_NAMES, _LONGEST = 200, 200
_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

READERS = {
    None: "its weights are ordinary tensors: stock transformers and every other reader of this "
    "architecture load them",
    "compressed-tensors": "its weights are compressed-tensors `pack-quantized`: stock transformers "
    "loads them with the compressed-tensors package, and other readers of that format should",
    "gptq": "its weights are in GPTQ's format: readers of that format should load them",
    "distaya": "its weights are in a format of distaya_ext's own, which nothing else reads; "
    "`distaya export` writes others",
}


def write(facts: Facts) -> Path | None:
    """Write the card, unless there is one that somebody wrote, or no model: None then."""
    path = facts.folder / CARD
    if not facts.config or (path.is_file() and not is_card(path)):
        return None
    data = seal(render(facts)).encode("utf-8", "replace")
    write_whole(path, lambda file: file.write_bytes(data))
    return path


def render(facts: Facts) -> str:
    """The card's text, the same for the same facts."""
    matter, problem = front_matter(facts)
    told = {
        "matter": Markup(matter),
        "problem": problem,
        "header": view_verdict.header(facts),
        "verdict": view_verdict.verdict(facts),
        "languages": view_languages.languages(facts),
        "degraded": view_run.degraded(facts),
        "size": view_run.size(facts),
        "speed": view_more.speed(facts),
        "limits": view_more.limits(facts),
        "reader": Markup(READERS.get(_method(facts), READERS["distaya"])),
        "report": facts.tells,
        "source_card": (facts.folder / SOURCE).is_file(),
        "licences": sorted(p.name for p in facts.folder.glob("LICEN[CS]E*")),
    }
    return environment(markdown, html=False).get_template("card.md.j2").render(told)


def markdown(value: Any) -> Any:
    """A value as text that Markdown shows as it is, in one line."""
    if isinstance(value, Markup):
        return str(value)
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", " ".join(clean(str(value)).split()))


def front_matter(facts: Facts) -> tuple[str, str | None]:
    """The YAML between the dashes, and what was wrong with that of the source."""
    carried, problem = _of_source(facts.folder / SOURCE)
    found = {key: carried[key] for key in _CARRIED if key in carried}
    model = facts.recipe.get("model")
    if isinstance(model, str) and _HUB.fullmatch(model):
        found["base_model"] = model
        if facts.recipe.get("bits"):
            found["base_model_relation"] = "quantized"
    stock = _method(facts) != "distaya"
    found["library_name"] = carried.get("library_name", "transformers") if stock else "distaya_ext"
    tags = carried.get("tags", [])
    found["tags"] = list(
        dict.fromkeys([*([tags] if isinstance(tags, str) else tags), "distaya_ext"])
    )
    text = yaml.safe_dump(found, allow_unicode=True, sort_keys=False, width=1000)
    return text.strip(), problem


def _of_source(path: Path) -> tuple[dict[str, Any], str | None]:
    """Plain entries of a card's front matter: strings and lists of strings. A card is no reason to
    fail, so what cannot be read is told instead.
    """
    from ..recipe_file import read_text_fields

    if not path.is_file():
        return {}, None
    with open(path, "rb") as file:
        start = file.read(_MOST_BYTES).decode("utf-8", "replace")
    match = re.match(r"﻿?---[ \t]*\r?\n(.*?)^---[ \t]*$", start, re.DOTALL | re.MULTILINE)
    if match is None:
        return {}, None
    try:
        fields = read_text_fields(match[1], SOURCE)
    except DistayaError:
        return (
            {},
            f"the front matter of {SOURCE} is not plain YAML, so nothing of it is repeated here",
        )
    return {key: plain for key, value in fields.items() if (plain := _plain(value))}, None


def _plain(value: Any) -> Any:
    """A string or a list of strings of a decent length, None for anything else."""
    if isinstance(value, bool) or value is None:
        return "no" if value is False else None  # YAML 1.1 reads Norwegian as false
    if isinstance(value, list):
        found = [each for each in map(_plain, value[:_MOST_NAMES]) if isinstance(each, str)]
        return found or None
    if isinstance(value, (str, int, float)):
        return " ".join(clean(str(value), _LONGEST).split())
    return None


def _method(facts: Facts) -> str | None:
    about = facts.config.get("quantization_config")
    method = about.get("quant_method") if isinstance(about, dict) else None
    return method if method is None or isinstance(method, str) else "unknown"
