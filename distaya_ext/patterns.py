"""Regular expressions that others wrote: refused where a miss could take for ever."""

from __future__ import annotations

import re

_MOST_REPEATS = 5  # unbounded repetitions in a pattern; each multiplies the time of a miss
_REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+{]")
_REPEAT = re.compile(r"(?<!\\)(?:[*+]|\{\d*,\})")


def fault(pattern: str, longest: int) -> str | None:
    """What is wrong with a pattern, None when it may be used; it goes behind "the pattern X"."""
    slow = _REPEATED_GROUP.search(pattern) or len(_REPEAT.findall(pattern)) > _MOST_REPEATS
    if slow or len(pattern) > longest:
        return (
            f"repeats a group, has more than {_MOST_REPEATS} repetitions or is longer than "
            f"{longest} characters"
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression ({error})"
    return None
