"""A recipe's YAML file as a mapping: small, shallow, plain, and no key twice."""

from __future__ import annotations

import os
from typing import Any

import yaml

from .errors import UsageError

# A recipe is a page of text, or several with a rule per matrix. The cap keeps a wrong file, or one
# made to exhaust memory, out of the parser.
MAX_YAML_BYTES = 1 << 18
_MAX_ALIASES = 16
_MAX_DEPTH = 16


def read_fields(path: str | os.PathLike) -> dict[str, Any]:
    """The mapping in a recipe file, not yet checked against the fields (flags may be added)."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_YAML_BYTES + 1)
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line, column = _line_and_column(raw[: error.start].decode("utf-8"))
        raise UsageError(
            f"recipe {path} is not UTF-8 at line {line}, column {column} (byte {error.start})"
        ) from None
    except OSError as error:
        raise UsageError(f"recipe {path} cannot be read: {error.strerror}") from None
    if len(raw) > MAX_YAML_BYTES:
        raise UsageError(f"recipe {path} is larger than {MAX_YAML_BYTES} bytes, which no recipe is")
    return read_text_fields(text, path)


def read_text_fields(text: str, path: str | os.PathLike) -> dict[str, Any]:
    """The mapping in a text; path names it in errors."""
    try:
        _check_shape(text, path)
        fields = yaml.load(text, Loader=_Loader)
    except UsageError:
        raise
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {path} is not plain YAML{_place(error, text)}") from None
    except ValueError as error:  # a date that is none, a number of thousands of digits
        raise UsageError(f"recipe {path} holds a value that is none: {error}") from None
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise UsageError(
            f"recipe {path} must be a mapping of names to values, not {type(fields).__name__}"
        )
    return fields


class _Loader(yaml.SafeLoader):
    """safe_load that refuses a key given twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key in (k for k, _ in node.value if isinstance(k, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _check_shape(text: str, path: str | os.PathLike) -> None:
    """Stop at the first sign of a document built to exhaust the parser (quadratic in depth, copies
    by << that double), and at tags, whose constructors take what they are given on trust.
    """
    depth = aliases = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if getattr(event, "tag", None) is not None:
            raise UsageError(
                f"recipe {path} is not plain YAML{_at(event.start_mark)}: the tag "
                f"{event.tag[:60]!r}, which no recipe needs"
            )
        if isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.implicit[0]:
            raise UsageError(
                f"recipe {path} is not plain YAML{_at(event.start_mark)}: << copies a mapping, "
                "which no recipe needs"
            )
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
            event, yaml.CollectionEndEvent
        )
        if depth > _MAX_DEPTH:
            raise UsageError(
                f"recipe {path} is nested deeper than {_MAX_DEPTH} levels, which no recipe is"
            )
        if aliases > _MAX_ALIASES:
            raise UsageError(
                f"recipe {path} has more than {_MAX_ALIASES} YAML aliases, which no recipe needs"
            )


def _place(error: yaml.YAMLError, text: str) -> str:
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not understood"
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"{_at(mark)}: {problem}"
    position = getattr(error, "position", None)  # of a character that YAML does not allow
    if not isinstance(position, int):
        return f": {problem}"
    line, column = _line_and_column(text[:position])
    return f" at line {line}, column {column}: {problem}"


def _at(mark: yaml.Mark) -> str:
    return f" at line {mark.line + 1}, column {mark.column + 1}"


def _line_and_column(before: str) -> tuple[int, int]:
    """Where the text goes on behind `before`, both from 1."""
    return before.count("\n") + 1, len(before) - before.rfind("\n")
