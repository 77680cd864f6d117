"""Commands under torchrun: which of them may run there, and that one rank alone speaks."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from ..errors import UsageError
from ..ranks import joined, leave

# Commands whose ranks share the work. All others would do the same work several times over.
RANKED = {"compress", "eval", "layers", "search", "distill", "heal", "finetune"}


def under_torchrun() -> bool:
    """Whether torchrun started more processes than this one."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def speaks() -> bool:
    """Whether this is the process that the user hears while nothing is known of the others."""
    return not under_torchrun() or os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Inside, no rank but the first prints anything."""
    if speaks():
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


@contextlib.contextmanager
def together(arguments: Sequence[str]) -> Iterator[None]:
    """The ranks of a command line; UsageError for a command that runs in one process."""
    if {"-h", "--help"} & set(arguments):
        yield
        return
    command = next((word for word in arguments if not word.startswith("-")), "")
    if command not in RANKED:
        raise UsageError(f"distaya {command} runs in one process; start it without torchrun")
    with joined(device_of(arguments)) as team:
        if team.first and not {"-q", "--quiet"} & set(arguments):
            for notice in team.notices:
                print(f"note: {notice}", file=sys.stderr)
        yield


def device_of(arguments: Sequence[str]) -> str:
    """What --device says on a command line, the last one where there are several."""
    found = "cpu"
    for at, word in enumerate(arguments):
        if word.startswith("--device="):
            found = word.partition("=")[2]
        elif word == "--device" and at + 1 < len(arguments):
            found = arguments[at + 1]
    return found


def quiet(error: BaseException) -> bool:
    """Whether another rank tells the user of it."""
    return getattr(error, "quiet", not speaks())


def end(code: object) -> NoReturn:
    """Exit; of several ranks that failed at once, without waiting for what backends still hold."""
    if under_torchrun() and code:
        leave(code if isinstance(code, int) else 1)
    sys.exit(code)
