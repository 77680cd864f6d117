"""Commands run on what a stranger hands in: one sentence, an exit code, and nothing touched."""

from pathlib import Path

from typer.testing import CliRunner

from distaya_ext.cli.app import app

USAGE, INPUT = 2, 3


def distaya(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def compress(place, *more):
    """A small run; flags in `more` win, since the last one counts."""
    return distaya(
        "compress", place / "model", "--out", place / "out", "--sparsity", "0.5", "--calib",
        place / "texts", "--tokens", 480, "--window", 16, *more,
    )  # fmt: skip


def evaluate(place, *more):
    return distaya("eval", place / "model", "--texts", place / "texts", "--window", 16, *more)


def one_sentence(result, code, *words):
    """The exit code, and a single line after Error: that holds the words."""
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    assert result.stdout == "" and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.stderr.rstrip().endswith(line)  # the sentence is not broken into lines
    for word in words:
        assert word in line, line


def contents(place: Path) -> dict:
    """Everything under a folder: bytes of files, targets of links, None for folders."""
    return {
        path: path.readlink()
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in place.rglob("*")
    }


def both_refuse(place, code, *words):
    """compress and eval refuse with this sentence and leave everything as it was."""
    before = contents(place)
    one_sentence(compress(place), code, *words)
    one_sentence(evaluate(place), code, *words)
    assert contents(place) == before
