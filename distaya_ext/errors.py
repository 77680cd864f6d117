"""The errors a user can cause, each tied to the exit code the command line returns for it."""

import errno

_MOST = 16_000  # characters of a sentence; that of a hundred missing shards is shorter


class DistayaError(ValueError):
    """Base of errors written for the user: one sentence, with the numbers in it.

    Names out of strangers' files stand in such sentences. What does not print (line ends, escape
    sequences of terminals, marks that turn the direction of writing) is shown as its escape.
    """

    exit_code = 1

    def __init__(self, sentence: object = ""):
        super().__init__(printable(str(sentence)))


class UsageError(DistayaError):
    """The command, recipe or argument is wrong (exit code 2)."""

    exit_code = 2


class InputError(DistayaError):
    """A model folder, tensor or text that was given cannot be used (exit code 3)."""

    exit_code = 3


class NumericsError(DistayaError):
    """The numbers went bad somewhere and the user asked to be stopped by that (exit code 4)."""

    exit_code = 4


class ResourceError(DistayaError):
    """The machine has too little memory or disk for the run (exit code 5)."""

    exit_code = 5


class LostError(DistayaError):
    """Another process of the same run has ended or does not answer (exit code 7)."""

    exit_code = 7


class GateError(DistayaError):
    """The result was produced but failed a quality gate the user asked for (exit code 6)."""

    exit_code = 6


def printable(text: str) -> str:
    """Text that is safe to show in a terminal, in one line."""
    if len(text) > _MOST:
        text = f"{text[:_MOST]} ... ({len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def one_line(error: Exception, most: int = 300) -> str:
    """What another library's error says, in one line of at most `most` characters."""
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:most]


def add_note(error: BaseException, note: str) -> None:
    """Have the sentence about an error also say this (Python's own notes need 3.11)."""
    error.__notes__ = [*notes(error), note]


def notes(error: BaseException) -> list[str]:
    """What add_note said of it."""
    return list(getattr(error, "__notes__", []))


def explain(error: Exception) -> tuple[str, int]:
    """One sentence for the user about any error, and the exit code."""
    if isinstance(error, DistayaError):
        return str(error), error.exit_code
    if hasattr(error, "format_message"):  # what typer raises for flags and arguments
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        return " ".join(error.format_message().split()) + hint, error.exit_code
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        first = str(error).strip().splitlines()
        return "out of memory" + (f": {first[0]}" if first else ""), 5
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return f"{error.strerror or error}{where}", 5 if full else 3
    return f"a fault in distaya: {type(error).__name__}: {error} (--debug shows where)", 1
