"""Model cards of folders we write: one that somebody edited is told from one that we wrote."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

CARD = "README.md"
SOURCE = "README.source.md"  # the card of the model that ours was made from
_SEAL = "<!-- card by distaya_ext {}; an edited card is kept -->"
_SEALED = re.compile(_SEAL.format(r"([0-9a-f]{32})") + r"\n?\Z")
_MOST_BYTES = 4 << 20  # of a file that may be a card of ours


def seal(text: str) -> str:
    """A card with the mark that it is ours and as we wrote it."""
    return text + _SEAL.format(_digest(text.encode("utf-8"))) + "\n"


def is_card(path: Path) -> bool:
    """Whether a file is a card of ours that nobody edited since."""
    if not path.is_file() or path.stat().st_size > _MOST_BYTES:
        return False
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    found = _SEALED.search(text)
    return found is not None and _digest(text[: found.start()].encode("utf-8")) == found[1]


def keep_edited(old: Path, new: Path) -> bool:
    """Carry the card of an older result into the one that takes its place, where somebody wrote it;
    whether that was so.
    """
    kept = old / CARD
    # A link may show a file that nobody meant to copy.
    if kept.is_symlink() or not kept.is_file() or is_card(kept):
        return False
    known = [new / name for name in (CARD, SOURCE) if (new / name).is_file()]
    if any(kept.read_bytes() == path.read_bytes() for path in known):
        return False
    (new / CARD).unlink(missing_ok=True)  # it may be a link to that of an earlier step
    shutil.copyfile(kept, new / CARD)
    return True


def carried_as(folder: Path, name: str) -> str | None:
    """The name that a readme of a source folder has in what is made from it; None: it stays behind.

    The source's own card is README.source.md there. A card of ours says nothing of the new model,
    so the one that it was made beside goes on in its place.
    """
    if name == CARD:
        return None if is_card(folder / CARD) else SOURCE
    if name == SOURCE and (folder / CARD).is_file() and not is_card(folder / CARD):
        return None
    return name


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
