"""What one rank finds out, or does, for all of them: an error of one becomes the error of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import errors
from .team import team


def by_first(act: Callable[[], Any]) -> Any:
    """act() on rank 0 alone; the plain value (as JSON has them) it returns, on every rank. What it
    refuses in a sentence is raised on all of them.
    """
    return _agreed(act if team().first else _nothing)[0]


def by_all(act: Callable[[], Any]) -> list[Any]:
    """act() on every rank; the plain values of all, in order. The first sentence in which one of
    them refuses is raised on all. Nothing in act may wait for another rank.
    """
    return _agreed(act)


def _agreed(act: Callable[[], Any]) -> list[Any]:
    us = team()
    if us.alone:
        return [act()]
    value, refused = None, None
    try:
        value = act()
    except errors.DistayaError as error:
        refused, kind, sentence = error, _known(error), str(error)
    found = us.gather([value, None if refused is None else [kind, sentence]])
    if refused is not None:
        raise refused
    for _, bad in found:
        if bad is not None:
            raise getattr(errors, bad[0])(bad[1])
    return [value for value, _ in found]


def _known(error: errors.DistayaError) -> str:
    """The class of the error that errors.py has: its exit code is the same."""
    return next(each.__name__ for each in type(error).__mro__ if hasattr(errors, each.__name__))


def _nothing() -> None:
    return None
