"""The pages of a folder: report.html and the model card README.md."""

from __future__ import annotations

from pathlib import Path

from ..durable import write_whole
from .facts import Facts, read

REPORT = "report.html"


def write_pages(
    folder: str | Path, out: str | Path | None = None, *, damaged: list[str] | None = None
) -> list[Path]:
    """Write what can be told of a folder of ours; returns the files, none where nothing is known.

    folder  of a model that we wrote: report.html and README.md in it are replaced by rename. A card
            that somebody edited stays as it is. Nothing is asked of the network or the clock: the
            same files give the same pages, byte for byte
    out     write report.html there instead, and leave the folder alone

    InputError in one sentence for a file of facts that is damaged; with a list `damaged` it goes
    there and onto the page, which is made without that file.
    """
    from . import card, page

    facts = read(folder, damaged)
    written = []
    if facts.tells:
        written.append(
            _write(facts.folder / REPORT if out is None else Path(out), page.render(facts))
        )
    if out is None and (path := card.write(facts)) is not None:
        written.append(path)
    return written


def _write(path: Path, text: str) -> Path:
    data = text.encode("utf-8", "replace")
    write_whole(path, lambda file: file.write_bytes(data))
    return path


__all__ = ["REPORT", "Facts", "read", "write_pages"]
