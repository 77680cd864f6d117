"""report.html: one file that needs nothing else, loads nothing and runs no script."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from . import view_languages, view_more, view_run, view_verdict
from .facts import Facts
from .words import clean

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).with_name("templates")


@functools.cache
def environment(show: Callable[[Any], Any], *, html: bool) -> Environment:
    """The templates: what is filled in is what show() makes of it, escaped where they are HTML, and
    a name that is missing is an error.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(TEMPLATES, encoding="utf-8"),
        autoescape=html,
        finalize=show,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _readable(value: Any) -> Any:
    """What is filled in, strangers' control characters made visible; it is escaped after this."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def render(facts: Facts) -> str:
    """The whole page, the same text for the same facts."""
    return environment(_readable, html=True).get_template("report.html.j2").render(context(facts))


def context(facts: Facts) -> dict[str, Any]:
    """What the templates say; a part is None where nothing was measured."""
    from .. import __version__

    return {
        "version": __version__,
        "header": view_verdict.header(facts),
        "verdict": view_verdict.verdict(facts),
        "languages": view_languages.languages(facts),
        "layers": view_run.layers(facts),
        "degraded": view_run.degraded(facts),
        "calibration": view_run.calibration(facts),
        "size": view_run.size(facts),
        "speed": view_more.speed(facts),
        "training": view_more.training(facts),
        "samples": view_more.samples(facts),
        "changes": view_more.changes(facts),
        "again": view_more.again(facts),
        "limits": view_more.limits(facts),
        "against": _against(facts),
    }


def _against(facts: Facts) -> str:
    """How the commands on the page name the model before."""
    source = facts.source or ""
    return source if source.count("/") == 1 else "MODEL"
